// Mxfp4LinearCpu and the loop around it against the definition, in double.
#include "mxfp4_linear/mxfp4_linear.h"

#include "common/linear_testing.h"

namespace dsv4 {
namespace {

constexpr WeightForm kForm = WeightForm::kMxfp4;

TEST(AgainstDefinition) {
  ExpectLinear(kForm, Mxfp4LinearCpu, {ActForm::kBf16, ActForm::kFp8}, {{2, 1, 3, 1024}});
}

// One code under every scale byte; 2^-127 is subnormal, byte 255 is NaN.
TEST(EveryCodeAndScale) {
  LinearProblem problem(kForm, Mxfp4LinearCpu, {1, 1, 256 * 16, 32}, ActForm::kBf16);
  problem.weight.Fill(0);
  for (int64_t i = 0; i < 32; ++i) problem.SetX(i, i == 5 ? 1.0f : 0.0f);
  for (int64_t row = 0; row < 256 * 16; ++row) {
    problem.weight[row * 16 + 2] = static_cast<uint8_t>(row % 16 << 4);
    problem.scale[row] = static_cast<uint8_t>(row / 16);
  }
  const std::vector<uint32_t> bits = problem.Run();
  for (int64_t row = 0; row < 256 * 16; ++row) {
    const float got = FloatFromBits(bits[row]);
    const auto expected = static_cast<float>(E2m1Definition(static_cast<int>(row % 16)) *
                                             Ue8m0Definition(static_cast<int>(row / 16)));
    if (!(std::isnan(got) && std::isnan(expected))) EXPECT_EQ(got, expected, row);
  }
}

TEST(OffsetsBeyond32Bits) { ExpectFarOffsets(kForm, Mxfp4LinearCpu, ActForm::kFp8); }

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
