// Fp8LinearCpu and the loop around it against the definition, in double.
#include "fp8_linear/fp8_linear.h"

#include "common/linear_testing.h"

namespace dsv4 {
namespace {

constexpr WeightForm kForm = WeightForm::kFp8;

TEST(AgainstDefinition) {
  ExpectLinear(kForm, Fp8LinearCpu, {ActForm::kBf16, ActForm::kFp8},
               {{5, 1, 19, 37}, {2, 1, 131, 130}, {2, 3, 21, 45}});
}

// Every code under every scale byte, rounded to BF16 below its smallest normal number.
TEST(EveryCodeAndScale) {
  LinearProblem problem(kForm, Fp8LinearCpu, {1, 1, 256 * 256, 1}, ActForm::kBf16);
  problem.SetX(0, 1);
  for (int64_t row = 0; row < 256 * 256; ++row) problem.weight[row] = static_cast<uint8_t>(row);
  for (int64_t tile = 0; tile < 512; ++tile) problem.scale[tile] = static_cast<uint8_t>(tile / 2);
  const std::vector<uint32_t> bits = problem.Run();
  for (int64_t row = 0; row < 256 * 256; ++row) {
    const float got = FloatFromBits(bits[row]);
    const double exact =
        E4m3Definition(static_cast<int>(row % 256)) * Ue8m0Definition(static_cast<int>(row / 256));
    const auto expected = static_cast<float>(RoundSignificant(exact, 8, -126));
    if (!(std::isnan(got) && std::isnan(expected))) EXPECT_EQ(got, expected, row);
  }
}

TEST(OffsetsBeyond32Bits) { ExpectFarOffsets(kForm, Fp8LinearCpu, ActForm::kFp8); }

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
