// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Everything for the host: views, policies, sessions and the CPU backend. No CUDA header.
#pragma once

#include "backend/cpu/cpu.hpp"
#include "engine/cpu_engine.hpp"
#include "engine/device_session.hpp"
#include "engine/policy_table.hpp"
#include "engine/session.hpp"
#include "policy/adakv.hpp"
#include "policy/cake.hpp"
#include "policy/dynamickv.hpp"
#include "policy/expected_attention.hpp"
#include "policy/fullkv.hpp"
#include "policy/h2o.hpp"
#include "policy/headkv.hpp"
#include "policy/keydiff.hpp"
#include "policy/knorm.hpp"
#include "policy/lagkv.hpp"
#include "policy/morphkv.hpp"
#include "policy/pyramidkv.hpp"
#include "policy/snapkv.hpp"
#include "policy/streamingllm.hpp"
#include "policy/tova.hpp"
#include "view/check.hpp"
#include "view/kv_view.hpp"
