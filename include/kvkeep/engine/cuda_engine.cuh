// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device sessions of run-time-chosen policies on CUDA: their names, and where they are compiled.
#pragma once

#include "../cuda.cuh"
#include "device_session.hpp"
#include "policy_table.hpp"

namespace kvkeep {

using any_cuda_policy = any_policy<cuda::context>;
using any_cuda_session = device_session<cuda::context, any_cuda_policy>;

#if defined(KVKEEP_CUDA_ENGINE_COMPILED)
extern template any_cuda_policy make_policy<cuda::context>(std::string_view, policy_options const&);
extern template class device_session<cuda::context, any_cuda_policy>;
extern template any_cuda_session
bind_device_session<cuda::context, any_cuda_policy, any_cuda_policy>(
    cuda::context&, any_cuda_policy const&, any_cuda_policy const&,
    std::span<layer_spec<device_space> const>, limits const&, std::span<std::byte>);
extern template std::size_t device_session_bytes<cuda::context, any_cuda_policy, any_cuda_policy>(
    cuda::context&, any_cuda_policy const&, any_cuda_policy const&,
    std::span<layer_spec<device_space> const>, limits const&);
#endif

}  // namespace kvkeep
