// Nvfp4LinearCpu and the loop around it against the definition, in double.
#include "nvfp4_linear/nvfp4_linear.h"

#include "common/linear_testing.h"

namespace dsv4 {
namespace {

constexpr WeightForm kForm = WeightForm::kNvfp4;

TEST(AgainstDefinition) {
  ExpectLinear(kForm, Nvfp4LinearCpu, {ActForm::kBf16, ActForm::kFp8, ActForm::kNvfp4},
               {{3, 1, 8, 16}, {2, 2, 10, 48}, {2, 1, 6, 176}});
}

// One code under every scale byte, its sign and NaN included.
TEST(EveryCodeAndScale) {
  LinearProblem problem(kForm, Nvfp4LinearCpu, {1, 1, 256 * 16, 16}, ActForm::kBf16);
  problem.global_scale = 1;
  problem.weight.Fill(0);
  for (int64_t i = 0; i < 16; ++i) problem.SetX(i, i == 4 ? 1.0f : 0.0f);
  for (int64_t row = 0; row < 256 * 16; ++row) {
    problem.weight[row * 8 + 2] = static_cast<uint8_t>(row % 16);
    problem.scale[row] = static_cast<uint8_t>(row / 16);
  }
  const std::vector<uint32_t> bits = problem.Run();
  for (int64_t row = 0; row < 256 * 16; ++row) {
    const float got = FloatFromBits(bits[row]);
    const auto expected = static_cast<float>(E2m1Definition(static_cast<int>(row % 16)) *
                                             E4m3Definition(static_cast<int>(row / 16)));
    if (!(std::isnan(got) && std::isnan(expected))) EXPECT_EQ(got, expected, row);
  }
}

TEST(StaticScale) {
  for (float scale : {0x1p-8f, 0.0123f, 1.0f}) {
    LinearProblem problem(kForm, Nvfp4LinearCpu, {9, 2, 10, 96}, ActForm::kNvfp4);
    problem.has_act_scale = true;
    problem.act_scale = scale;
    ExpectDefinition(problem);
    ExpectSameInAnySplit(problem);
    for (float bad : {kNan, kInf, -kInf}) ExpectBadTokenAlone(problem, bad);
  }
}

TEST(StaticScaleIsClamped) {
  for (auto [scale, used] : {std::pair{0.0f, 0x1p-100f}, {-1.0f, 0x1p-100f}, {kInf, 0x1p100f}}) {
    LinearProblem problem(kForm, Nvfp4LinearCpu, {2, 1, 10, 96}, ActForm::kNvfp4);
    problem.has_act_scale = true;
    problem.act_scale = scale;
    const std::vector<uint32_t> got = problem.Run();
    problem.act_scale = used;
    EXPECT_EQ(got, problem.Run(), scale);
  }
}

TEST(GatedX) { ExpectGated(kForm, Nvfp4LinearCpu, ActForm::kNvfp4, {5, 3, 18, 144}); }

TEST(OffsetsBeyond32Bits) { ExpectFarOffsets(kForm, Nvfp4LinearCpu, ActForm::kNvfp4); }

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
