// The conversion that the compiler calls where the processor has none: float to bfloat, to nearest even.
#include <stdint.h>

extern "C" __bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint16_t rounded = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_bit_cast(__bf16, rounded);
}
