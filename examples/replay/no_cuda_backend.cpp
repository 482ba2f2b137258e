// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "backend.hpp"

namespace kvkeep::replay {

std::unique_ptr<backend> make_cuda_backend() {
  throw unsupported("backend cuda, this build has none");
}

}  // namespace kvkeep::replay
