// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../engine/device_orders.cpp"
