// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Two units include the whole library (a second definition of anything would not link); both must agree.
int version_in_a();
int version_in_b();

int main() { return version_in_a() > 0 && version_in_a() == version_in_b() ? 0 : 1; }
