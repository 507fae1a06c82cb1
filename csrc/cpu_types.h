// Two-byte number formats as memory holds them. In an unnamed namespace on purpose: see
// cpu_dot.inl.
#pragma once

#include <stdint.h>

namespace {

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

}  // namespace
