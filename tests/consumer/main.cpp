// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Two units include the whole library (a second definition of anything would not link); both must agree.
int kept_in_a();
int kept_in_b();

int main() { return kept_in_a() == 8 && kept_in_b() == 8 ? 0 : 1; }
