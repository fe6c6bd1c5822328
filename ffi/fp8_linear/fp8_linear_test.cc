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

// x as codes: what its values in BF16 give, whatever tokens are taken at a time.
TEST(CodedX) {
  const LinearShape shape = {5, 3, 18, 256};
  const int64_t size = shape.t * shape.groups * shape.k;
  LinearProblem wide(kForm, Fp8LinearCpu, shape, ActForm::kBf16);
  Guarded<uint8_t> code(size, 1), scale(size / 128, 1);
  for (int64_t i = 0; i < size / 128; ++i) scale[i] = static_cast<uint8_t>(110 + i % 23);
  for (int64_t i = 0; i < size; ++i) {
    code[i] = static_cast<uint8_t>(i * 37 % 0x7F + i % 2 * 0x80);
    wide.SetX(i, static_cast<float>(E4m3Definition(code[i]) * Ue8m0Definition(scale[i / 128])));
  }
  const std::vector<uint32_t> expected = wide.Run();
  Guarded<float> y(shape.t * shape.n);
  LinearParams params = wide.Params(y.data(), false);
  params.x = code.data();
  params.x_scale = scale.data();
  params.act = ActForm::kFp8;
  ExpectWhateverIsTaken(params, Fp8LinearCpu, y, expected);
  EXPECT_EQ(y.Intact() && code.Intact() && scale.Intact(), true);
}

TEST(GatedX) { ExpectGated(kForm, Fp8LinearCpu, ActForm::kFp8, {5, 3, 18, 133}); }

TEST(OffsetsBeyond32Bits) { ExpectFarOffsets(kForm, Fp8LinearCpu, ActForm::kFp8); }

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
