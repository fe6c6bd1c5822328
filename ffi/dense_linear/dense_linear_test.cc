// DenseLinearCpu and the loop around it against the definition, in double.
#include "dense_linear/dense_linear.h"

#include "common/linear_testing.h"

namespace dsv4 {
namespace {

constexpr WeightForm kForm = WeightForm::kBf16;

TEST(AgainstDefinition) {
  ExpectLinear(kForm, DenseLinearCpu, {ActForm::kBf16},
               {{3, 1, 7, 1}, {5, 1, 19, 37}, {2, 3, 21, 45}});
}

// Products below the smallest normal number count.
TEST(SubnormalProducts) {
  LinearProblem problem(kForm, DenseLinearCpu, {1, 1, 2, 32}, ActForm::kBf16);
  for (int64_t i = 0; i < 32; ++i) problem.SetX(i, 0x1p-100f);
  for (int64_t i = 0; i < 64; ++i) LinearProblem::SetBf16(problem.weight, i, 0x1p-40f);
  for (uint32_t bits : problem.Run()) EXPECT_EQ(FloatFromBits(bits), 0x1p-135f);
  ExpectSameInAnySplit(problem);
}

TEST(OffsetsBeyond32Bits) { ExpectFarOffsets(kForm, DenseLinearCpu, ActForm::kBf16); }

}  // namespace
}  // namespace dsv4

int main() { return dsv4::RunAll(); }
