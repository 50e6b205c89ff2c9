// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the deltamem project
//
// Copies of tokens whose elements lie side by side, and of whole lines past the caches. Included once for each
// instruction set, with its vectors: DELTAMEM_STREAM_LINE(from, to) copies an aligned line with stores past the caches.

namespace {

// Copies of a length that the compiler knows are a few instructions; others are a call.
template <int64_t Bytes>
void copy_rows(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t to_step) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * to_step, from[k], Bytes);
}

void rows(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t to_step, int64_t bytes) {
  if (bytes == 128) return copy_rows<128>(from, count, to, to_step);
  if (bytes == 160) return copy_rows<160>(from, count, to, to_step);
  if (bytes == 192) return copy_rows<192>(from, count, to, to_step);
  if (bytes == 256) return copy_rows<256>(from, count, to, to_step);
  if (bytes == 512) return copy_rows<512>(from, count, to, to_step);
  for (int64_t k = 0; k < count; ++k) std::memcpy(to + k * to_step, from[k], bytes);
}

void stream(const uint8_t* from, int64_t bytes, uint8_t* to) {
  int64_t done = 0;
#ifdef DELTAMEM_STREAM_LINE
  if (reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    for (; done + kLine <= bytes; done += kLine) DELTAMEM_STREAM_LINE(from + done, to + done);
  }
#endif
  std::memcpy(to + done, from + done, bytes - done);
}

}  // namespace
