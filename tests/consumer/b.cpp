// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/kvkeep.hpp>

int version_in_b() { return KVKEEP_VERSION; }
