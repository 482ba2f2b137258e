// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// kvkeep-replay on the CUDA backend, through a device session.
#include <kvkeep/engine/cuda_engine.cuh>

#include <optional>

#include "trace_on.hpp"

namespace kvkeep::replay {

/// Memory that host and device share: every array of a case is written by one and read by the other.
template <class T>
struct managed_allocator {
  using value_type = T;
  managed_allocator() = default;
  template <class U>
  managed_allocator(managed_allocator<U> const&) noexcept {}
  T* allocate(std::size_t n) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, n * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  void deallocate(T* p, std::size_t) noexcept { cudaFree(p); }
  template <class U>
  bool operator==(managed_allocator<U> const&) const noexcept {
    return true;
  }
};

inline cudaStream_t make_stream() {
  int devices = 0, managed = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0)
    error = cudaDeviceGetAttribute(&managed, cudaDevAttrConcurrentManagedAccess, 0);
  if (error == cudaSuccess && (devices == 0 || managed == 0))
    throw no_device(devices == 0 ? "no CUDA device"
                                 : "host and device cannot share managed memory at once");
  cudaStream_t stream = nullptr;
  if (error == cudaSuccess) error = cudaStreamCreate(&stream);
  if (error != cudaSuccess) throw no_device(cudaGetErrorString(error));
  return stream;
}

struct cuda_machine {
  using context = cuda::context;
  template <class T>
  using allocator = managed_allocator<T>;
  class session;

  cuda_machine() : ctx(make_stream()) {}
  cuda_machine(cuda_machine const&) = delete;
  cuda_machine& operator=(cuda_machine const&) = delete;
  ~cuda_machine() { cudaStreamDestroy(ctx.stream); }

  void wait() {
    cudaError_t const error = cudaStreamSynchronize(ctx.stream);
    if (error != cudaSuccess) throw call_failed(cudaGetErrorString(error));
  }

  context ctx;
};

/// A device session, whose refusals and faults are exceptions. Entry i of a batch is sequence i.
class cuda_machine::session {
 public:
  using policy_type = any_policy<cuda::context>;
  using layers_type = std::vector<layer_spec<device_space>>;

  session(cuda_machine& m, policy_type const& prompt, policy_type const& decode,
          layers_type const& layers, limits lim)
      : m_(m), shape_(layers[0].kv.shape) {
    // A token counts once it is attended to. Without queries any will do: the policy looks at none.
    lim.decode = decode_offer::attend;
    std::span<layer_spec<device_space> const> const specs(layers);
    memory_.resize(device_session_bytes(m.ctx, prompt, decode, specs, lim));
    s_.emplace(bind_device_session(m.ctx, prompt, decode, specs, lim,
                                   std::span<std::byte>(memory_.data(), memory_.size())));
    sequences_ = lim.max_sequences;
  }
  session(session const&) = delete;
  session& operator=(session const&) = delete;
  ~session() { cudaStreamSynchronize(m_.ctx.stream); }

  void begin(index_t id) {
    index_t got = -1;
    expect(s_->begin(got, {id}), "begin");
  }
  void observe(index_t layer, index_t id, queries const& q) {
    expect(s_->observe(layer, id, q), "observe");
  }
  void end_prompt(index_t id) { expect(s_->end_prompt(id), "end_prompt"); }
  void append(array_on<cuda_machine, index_t> const& ids, index_t* slots) {
    expect(s_->append(0, batch_of(ids), slots), "append");
    verify();
  }
  void attend(array_on<cuda_machine, index_t> const& ids, queries const& q, float* out) {
    queries shown = q;
    if (q.data == nullptr) {
      zeros_.resize(product(ids.size(), shape_.n_q_heads, shape_.dim_k));
      shown = make_queries(zeros_.data(), shape_.n_q_heads, 1, shape_.dim_k);
    }
    expect(s_->attend(0, batch_of(ids), shown, out), "attend");
  }
  void verify() {
    m_.wait();
    for (index_t id = 0; id < sequences_; ++id)
      if (s_->faults()[id] != 0)
        throw call_failed("sequence " + std::to_string(id) + " has fault " +
                          std::to_string(s_->faults()[id]));
  }
  auto lengths(index_t layer) const { return s_->lengths(layer); }
  auto positions(index_t layer) const { return s_->positions(layer); }
  auto free_slots(index_t layer) const { return s_->free_slots(layer); }

 private:
  static batch_ref<device_space> batch_of(array_on<cuda_machine, index_t> const& ids) {
    return {static_cast<index_t>(ids.size()), ids.data(), ids.data()};
  }

  cuda_machine& m_;
  cache_shape shape_;
  index_t sequences_ = 0;
  array_on<cuda_machine, std::byte> memory_;
  array_on<cuda_machine, float> zeros_;
  std::optional<device_session<cuda::context, policy_type, policy_type>> s_;
};

std::unique_ptr<backend> make_cuda_backend() {
  return std::make_unique<backend_on<cuda_machine>>();
}

}  // namespace kvkeep::replay
