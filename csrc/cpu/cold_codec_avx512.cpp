// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project

#include "cold_codec.inl"

const ColdKernels kColdAvx512 = {encode_one, decode_one, gather_channels};
