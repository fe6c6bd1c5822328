// Clamped SwiGLU (model.md 5.2).
#pragma once

#include "common/exp.h"
#include "common/host_device.h"

namespace dsv4 {

// silu(gate) * up behind their clamps. NaN stays NaN.
DSV4_HOST_DEVICE inline float ClampedSwiglu(float gate, float up, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  return g * SigmoidOfNumber(g) * u;
}

}  // namespace dsv4
