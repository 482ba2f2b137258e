// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Small kernels, with races and without: race_check.cpp must tell them apart.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include <cuda_runtime.h>

#include "support/catch.hpp"

namespace kvkeep::cuda {
extern uint4 shared_words[227 * 1024 / 16];
}

namespace {

int device_words[256];
unsigned ticket = 0;

int* shared_ints() { return reinterpret_cast<int*>(kvkeep::cuda::shared_words); }
int thread() { return static_cast<int>(threadIdx.x); }

enum class meeting { none, warp, block, exchange };
void meet(meeting m) {
  if (m == meeting::warp) __syncwarp();
  if (m == meeting::block) __syncthreads();
  if (m == meeting::exchange) __shfl_sync(0xffffffffu, 0, 0);
}

/// Each thread reads what its neighbour has written, in its warp or beyond.
template <meeting M, int Step>
void neighbour(int) {
  shared_ints()[thread()] = thread();
  meet(M);
  device_words[thread()] = shared_ints()[(thread() + Step) % 64];
}
/// All threads read a word, which one of them then changes.
template <meeting M>
void change_after_reading(int) {
  if (thread() == 0) shared_ints()[0] = 1;
  __syncthreads();
  device_words[thread()] = shared_ints()[0];
  meet(M);
  if (thread() == 5) shared_ints()[0] = 2;
}
void add_plainly(int) {
  if (thread() == 0) device_words[0] += 1;
}
void add_atomically(int) { atomicAdd(&device_words[0], 1); }
void add_and_read(int) {
  atomicAdd(&device_words[0], 1);
  device_words[1 + thread() + 64 * static_cast<int>(blockIdx.x)] = device_words[0];
}
/// The last of four blocks reads what the others have written.
enum class fences { both, none, before };
template <fences F>
void last_block_reads(int) {
  int const block = static_cast<int>(blockIdx.x);
  device_words[64 * block + thread()] = 1;
  __syncthreads();
  bool last = false;
  if (thread() == 0) {
    if (F != fences::none) __threadfence();
    last = atomicInc(&ticket, 3) == 3;
    if (F == fences::both) __threadfence();
  }
  if (__syncthreads_or(last ? 1 : 0) == 0) return;
  int sum = 0;
  for (int b = 0; b < 4; ++b) sum += device_words[64 * b + thread()];
  device_words[thread()] = sum;
}
void own_words(int) { device_words[thread() + 64 * static_cast<int>(blockIdx.x)] = 1; }
void unwritten(int) { device_words[thread()] = shared_ints()[thread()]; }
template <meeting M>
void asynchronous(int) {
  emulation::start_copy(shared_ints() + 4 * thread(), device_words + 4 * thread(), 16, 0);
  emulation::end_copy_group();
  emulation::wait_copy_groups(0);
  meet(M);
  device_words[thread()] = shared_ints()[(4 * thread() + 4) % 256];
}
template <meeting M>
void copy_over_what_is_read(int) {
  shared_ints()[thread()] = 0;
  __syncthreads();
  device_words[thread()] = shared_ints()[63 - thread()];
  meet(M);
  if (thread() < 16) {
    emulation::start_copy(shared_ints() + 4 * thread(), device_words + 128 + 4 * thread(), 16, 0);
    emulation::end_copy_group();
    emulation::wait_copy_groups(0);
  }
}
/// Threads that meet their block or warp from two places, half of a warp in each.
void two_barriers(int) {
  if (thread() % 32 < 16)
    __syncthreads();
  else
    __syncthreads();
}
void two_barriers_anywhere(int) {
  if (thread() % 32 < 16)
    emulation::block_barrier(false, true);
  else
    emulation::block_barrier(false, true);
}
void two_shuffles(int) {
  int x = 0;
  if (thread() % 32 < 16)
    x = __shfl_sync(0xffffffffu, thread(), 3);
  else
    x = __shfl_sync(0xffffffffu, thread(), 3);
  device_words[thread()] = x;
}
/// The same through a function that is written once.
int from_lane_3(int x) { return __shfl_sync(0xffffffffu, x, 3); }
void two_calls(int) {
  int x = 0;
  if (thread() % 32 < 16)
    x = from_lane_3(1);
  else
    x = from_lane_3(2);
  device_words[thread()] = x;
}
void shuffle_and_ballot(int) {
  device_words[thread()] =
      thread() % 32 < 16 ? __shfl_sync(0xffffffffu, 1, 3) : __any_sync(0xffffffffu, 1);
}
/// One place after another, in loops that some leave before others do.
void one_place(int) {
  for (int i = 0; i < 3; ++i) {
    if (i == thread() % 3) device_words[thread()] = i;
    device_words[thread()] += from_lane_3(i);
    __syncthreads();
  }
}
/// Overlapped kernels, which wait for those in front in time, too late, and never.
void in_time(int) {
  emulation::let_next_start();
  emulation::wait_for_previous();
  device_words[thread()] = 1;
}
void too_late(int) {
  emulation::let_next_start();
  device_words[thread()] = 1;
  emulation::wait_for_previous();
}
int const* on_stack = nullptr;
void reads_stack(int) { device_words[thread()] = *on_stack; }
void never(int) { emulation::let_next_start(); }
void beyond(int) { shared_ints()[1024 + thread()] = 0; }

/// What a program says that launches the kernel twice, with 64 threads and 4 KiB; "" if it ends well.
std::string complaint(void (*kernel)(int), unsigned blocks = 1, bool overlap = false) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(nullptr);
  pid_t const child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    std::signal(SIGABRT, SIG_DFL);
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = 64;
    config.dynamicSmemBytes = 4096;
    cudaLaunchAttribute attribute{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    for (int i = 0; i < 2; ++i) cudaLaunchKernelEx(&config, kernel, 0);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[256];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;)
    text.append(part, static_cast<std::size_t>(n));
  close(ends[0]);
  int code = 0;
  REQUIRE(waitpid(child, &code, 0) == child);
  REQUIRE((WIFEXITED(code) ? text.empty() : !text.empty()));
  return text;
}
bool has(std::string const& text, char const* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("threads that meet at barriers are in order") {
  CHECK(complaint(neighbour<meeting::block, 33>).empty());
  CHECK(complaint(change_after_reading<meeting::block>).empty());
  CHECK(complaint(asynchronous<meeting::block>).empty());
  CHECK(complaint(copy_over_what_is_read<meeting::block>).empty());
  CHECK(complaint(own_words, 4).empty());
  CHECK(complaint(add_plainly).empty());
  CHECK(complaint(add_atomically, 4).empty());
}

TEST_CASE("a missing barrier is a race") {
  CHECK(has(complaint(neighbour<meeting::none, 1>), "of shared"));
  CHECK(has(complaint(neighbour<meeting::exchange, 1>), "of shared"));
  CHECK(has(complaint(neighbour<meeting::warp, 33>), "of shared"));
  CHECK(has(complaint(change_after_reading<meeting::none>), "of shared"));
  CHECK(has(complaint(change_after_reading<meeting::warp>), "of shared"));
  CHECK(has(complaint(asynchronous<meeting::none>), "of shared"));
  CHECK(has(complaint(copy_over_what_is_read<meeting::none>), "of shared"));
}

TEST_CASE("a warp's barrier orders its own lanes") {
  auto const in_warp = [](int) {
    shared_ints()[thread()] = thread();
    __syncwarp();
    device_words[thread()] = shared_ints()[thread() ^ 1];
  };
  CHECK(complaint(in_warp).empty());
}

TEST_CASE("blocks are not in order") {
  CHECK(has(complaint(add_plainly, 2), "of device memory"));
  CHECK(has(complaint(add_plainly, 2), "of another block"));
  CHECK(has(complaint(add_and_read), "of device memory"));
}

TEST_CASE("the last block at a ticket comes after the others, if there are fences") {
  CHECK(complaint(last_block_reads<fences::both>, 4).empty());
  CHECK(has(complaint(last_block_reads<fences::none>, 4), "before a fence"));
  CHECK(has(complaint(last_block_reads<fences::before>, 4), "of another block"));
}

TEST_CASE("threads meet in one place of the code") {
  CHECK(complaint(one_place).empty());
  CHECK(has(complaint(two_barriers), "several places"));
  CHECK(complaint(two_barriers_anywhere).empty());
  CHECK(has(complaint(two_shuffles), "several places"));
  CHECK(has(complaint(two_calls), "several places"));
  CHECK(has(complaint(shuffle_and_ballot), "different operations"));
}

TEST_CASE("an overlapped kernel waits before it touches memory") {
  CHECK(complaint(in_time, 1, true).empty());
  CHECK(has(complaint(too_late, 1, true), "before the kernels in front"));
  CHECK(has(complaint(never, 1, true), "without waiting"));
  CHECK(complaint(too_late).empty());
}

TEST_CASE("no kernel reads the host's stack") {
  int const here = 3;
  on_stack = &here;
  CHECK(has(complaint(reads_stack), "touches the host's stack"));
  std::vector<int> const on_heap{3};
  on_stack = on_heap.data();
  CHECK(complaint(reads_stack).empty());
}

TEST_CASE("shared memory starts without values, and ends") {
  CHECK(has(complaint(unwritten), "has not written"));
  CHECK(has(complaint(beyond), "behind the shared memory"));
}
