// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/kvkeep.hpp>  // the library's headers come in any order

#include KVKEEP_EXAMPLE
