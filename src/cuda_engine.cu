// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Device sessions of run-time-chosen policies, compiled once (target kvkeep::cuda_engine).
#include <kvkeep/engine/cuda_engine.cuh>

namespace kvkeep {

template any_cuda_policy make_policy<cuda::context>(std::string_view, policy_options const&);
template class device_session<cuda::context, any_cuda_policy>;
template any_cuda_session bind_device_session<cuda::context, any_cuda_policy, any_cuda_policy>(
    cuda::context&, any_cuda_policy const&, any_cuda_policy const&,
    std::span<layer_spec<device_space> const>, limits const&, std::span<std::byte>);
template std::size_t device_session_bytes<cuda::context, any_cuda_policy, any_cuda_policy>(
    cuda::context&, any_cuda_policy const&, any_cuda_policy const&,
    std::span<layer_spec<device_space> const>, limits const&);

}  // namespace kvkeep
