// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CPU backend's context and its optional threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "../../op/backend.hpp"
#include "../../view/kv_ref.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// A fixed set of threads that share the tasks of one call. Only the constructor allocates.
class thread_pool {
 public:
  /// @param n_threads threads that work on a call, the calling one included; at least 1
  explicit thread_pool(int n_threads) : thread_pool() {
    threads_.reserve(static_cast<std::size_t>(std::max(n_threads, 1) - 1));
    // Should a thread not start, the destructor ends the others: the object is complete by now.
    for (int worker = 1; worker < n_threads; ++worker)
      threads_.emplace_back([this, worker] { serve(worker); });
  }
  thread_pool(thread_pool const&) = delete;
  thread_pool& operator=(thread_pool const&) = delete;
  ~thread_pool() {
    stop_.store(true, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  int size() const noexcept { return static_cast<int>(threads_.size()) + 1; }

  /// Calls `f(task, worker)` once for each task in [0, n_tasks), `worker` in [0, size()) and below
  /// n_tasks, and returns when all are done. `f` must not throw. Several threads may call at once:
  /// while the pool is busy, the others do their tasks alone.
  template <class F>
  void parallel_for(index_t n_tasks, F& f) noexcept {
    if (n_tasks <= 1 || threads_.empty() || busy_.exchange(true, std::memory_order_acquire)) {
      for (index_t task = 0; task < n_tasks; ++task) f(task, 0);
      return;
    }
    call_ = [](void* object, index_t task, int worker) {
      (*static_cast<F*>(object))(task, worker);
    };
    object_ = const_cast<void*>(static_cast<void const*>(&f));
    n_tasks_ = n_tasks;
    next_.store(0, std::memory_order_relaxed);
    active_.store(size() - 1, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_tasks(0);
    wait_while(active_, [](int active) { return active > 0; });
    busy_.store(false, std::memory_order_release);
  }

 private:
  thread_pool() = default;

  /// Looks for a while before it sleeps: most calls take some microseconds.
  template <class T, class P>
  static T wait_while(std::atomic<T>& value, P pending) noexcept {
    T now = value.load(std::memory_order_acquire);
    for (int spin = 0; spin < 2000 && pending(now); ++spin)
      now = value.load(std::memory_order_acquire);
    while (pending(now)) {
      value.wait(now, std::memory_order_acquire);
      now = value.load(std::memory_order_acquire);
    }
    return now;
  }

  void take_tasks(int worker) noexcept {
    for (index_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;)
      call_(object_, task, worker);
  }

  void serve(int worker) noexcept {
    std::uint32_t seen = 0;
    for (;;) {
      seen = wait_while(generation_, [seen](std::uint32_t now) { return now == seen; });
      if (stop_.load(std::memory_order_relaxed)) return;
      if (worker < n_tasks_) take_tasks(worker);  // scratch is for context::workers of them
      if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) active_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  void (*call_)(void*, index_t, int) = nullptr;
  void* object_ = nullptr;
  index_t n_tasks_ = 0;
  std::atomic<bool> busy_{false};
  std::atomic<bool> stop_{false};
  std::atomic<index_t> next_{0};
  std::atomic<int> active_{0};
  std::atomic<std::uint32_t> generation_{0};
};

/// Runs ops in the calling thread, or in a pool that outlives the context. The results do not
/// depend on the number of threads.
struct context {
  thread_pool* pool = nullptr;

  int threads() const noexcept { return pool == nullptr ? 1 : pool->size(); }
  /// Threads that can take part in `n_tasks` tasks; scratch is per worker.
  int workers(index_t n_tasks) const noexcept {
    return std::min(threads(), std::max<int>(static_cast<int>(n_tasks), 1));
  }
};

/// Nothing to wait for: a call's work is done when it returns.
inline status follow(context&, context&) noexcept { return status::ok; }

/// f(entry, kv_head, worker) for all heads of a batch.
template <class F>
void for_heads(context const& c, index_t n_entries, index_t n_heads, F const& f) noexcept {
  auto const task = [&](index_t i, int worker) { f(i / n_heads, i % n_heads, worker); };
  if (c.pool != nullptr)
    c.pool->parallel_for(n_entries * n_heads, task);
  else
    for (index_t i = 0; i < n_entries * n_heads; ++i) task(i, 0);
}

/// f(entry, kv_head) with the head that comes after (b, h), if there is one: what it reads can be fetched.
template <class F>
void with_next_head(index_t n_entries, index_t n_heads, index_t b, index_t h, F const& f) noexcept {
  index_t const next = b * n_heads + h + 1;
  if (next < n_entries * n_heads) f(next / n_heads, next % n_heads);
}

/// One piece of scratch per worker, each on cache lines of its own.
template <class T>
struct worker_scratch {
  T* base = nullptr;
  std::size_t each = 0;

  T* operator()(int worker) const noexcept {
    return base + static_cast<std::size_t>(worker) * each;
  }
};

template <class T>
worker_scratch<T> take_each(workspace& ws, int workers, std::size_t n) noexcept {
  constexpr std::size_t line = workspace::alignment / sizeof(T);
  std::size_t const each = (n + line - 1) / line * line;
  return {ws.take<T>(each * static_cast<std::size_t>(workers)), each};
}

/// After the scratch has been taken: whether there is memory to work on, and the result if not.
inline bool placed(workspace const& ws) noexcept { return !ws.measuring() && ws.ok(); }
inline status not_placed(workspace const& ws) noexcept {
  return ws.measuring() ? status::ok : status::workspace_too_small;
}

constexpr std::size_t size_of(index_t n) noexcept { return static_cast<std::size_t>(n); }

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu

template <>
struct kvkeep::backend_traits<kvkeep::cpu::context> {
  using space = kvkeep::host_space;
  static constexpr char const* name = "cpu";
};
