// The 10-bit logarithmic format: what it keeps, and how much of the rest.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "device/algo/formats.h"
#include "layout/heap.h"

namespace deep_ep::test {
namespace {

std::vector<float> through(const std::vector<float>& values) {
    algo::LogRange range;
    for (float value : values) range.add(value);
    const algo::LogScale scale = algo::log_scale(range);
    const algo::LogDivisor divisor = algo::log_divisor(scale.step);
    std::vector<float> decoded;
    for (float value : values) {
        const uint32_t code = algo::log_encode(value, scale, divisor);
        CHECK_LT(code, 1024u);
        decoded.push_back(algo::log_decode(code, scale));
    }
    return decoded;
}

// Half a step of the widest scale, in units of the logarithm that the float's bits are.
constexpr float kMaxRelativeError = 12.0f / (2 * 509) * 1.01f;

TEST_CASE("logfmt: zeros, signs, and single values are exact") {
    CHECK_EQ(through({0.0f, 0.0f}), std::vector<float>{0.0f, 0.0f});
    CHECK(std::signbit(through({-0.0f})[0]));
    for (float value : {1.0f, -1.0f, 3.14159f, -1e-38f, 1e-45f, 3.4e38f})
        CHECK_EQ(through({value, 0.0f, value}), std::vector<float>{value, 0.0f, value});
    CHECK_EQ(through({1.0f, -2.0f})[0], 1.0f);  // the smallest is code 1
}

TEST_CASE("logfmt: dividing by a step is exact for every step there is, at the borders of every quotient there is") {
    constexpr uint32_t kSpan = algo::kLogOctaves * algo::kFloatOctave;
    constexpr uint32_t kWidest = (kSpan + algo::kLogSteps - 1) / algo::kLogSteps;
    uint64_t num_wrong = 0;
    for (uint32_t step = 1; step <= kWidest; ++step) {
        const algo::LogDivisor divisor = algo::log_divisor(step);
        for (uint32_t quotient = 1; quotient <= algo::kLogSteps + 1; ++quotient) {
            num_wrong += divisor.quotient(quotient * step) != quotient;
            num_wrong += divisor.quotient(quotient * step - 1) != quotient - 1;
        }
    }
    CHECK_EQ(num_wrong, 0);
    CHECK_EQ(algo::log_divisor(1).quotient((1u << algo::kLogDividendBits) - 1), (1u << algo::kLogDividendBits) - 1);
}

TEST_CASE("logfmt: what is not finite becomes NaN, and spoils nothing else") {
    const float infinity = std::numeric_limits<float>::infinity();
    const auto got = through({infinity, -infinity, std::nanf(""), 2.0f, 0.0f});
    for (size_t i = 0; i < 3; ++i) CHECK(std::isnan(got[i]));
    CHECK_EQ(got[3], 2.0f);
    CHECK_EQ(got[4], 0.0f);
    CHECK(std::isnan(through({infinity})[0]));
}

TEST_CASE("logfmt: relative error within twelve octaves of the largest, absolute error below") {
    std::mt19937_64 rng(1);
    for (int round = 0; round < 2000; ++round) {
        const float spread = static_cast<float>(round % 40) + 0.5f;
        const float centre = static_cast<float>(round % 200 - 100);
        std::vector<float> values(128);
        float largest = 0.0f;
        for (float& value : values) {
            const float exponent = std::uniform_real_distribution<float>(centre - spread, centre)(rng);
            value = std::exp2(exponent) * (rng() % 2 == 0 ? 1.0f : -1.0f);
            largest = std::max(largest, std::fabs(value));
        }
        const auto got = through(values);
        for (size_t i = 0; i < values.size(); ++i) {
            const float error = std::fabs(got[i] - values[i]);
            const float floor = largest / 8192;  // half of the lowest step
            REQUIRE_LE(error, std::max(std::fabs(values[i]) * kMaxRelativeError, floor * 1.01f));
        }
    }
}

TEST_CASE("logfmt: normally distributed values lose 0.4 percent of their size, and no bias adds up") {
    std::mt19937_64 rng(2);
    std::normal_distribution<float> normal;
    double worst = 0, bias = 0, squares = 0, power = 0;
    for (int round = 0; round < 500; ++round) {
        std::vector<float> values(128);
        for (float& value : values) value = normal(rng);
        const auto got = through(values);
        for (size_t i = 0; i < values.size(); ++i) {
            const double error = static_cast<double>(got[i]) - static_cast<double>(values[i]);
            if (std::fabs(values[i]) > 0.01f)
                worst = std::max(worst, std::fabs(error / static_cast<double>(values[i])));
            bias += std::copysign(1.0, static_cast<double>(values[i])) * error;
            squares += error * error;
            power += static_cast<double>(values[i]) * static_cast<double>(values[i]);
        }
    }
    CHECK_LT(worst, static_cast<double>(kMaxRelativeError));
    CHECK_LT(std::sqrt(squares / power), 0.004);
    CHECK_LT(std::fabs(bias / 64000), 1e-4);
}

TEST_CASE("logfmt: a row takes two thirds of bfloat16's bytes, and never more than its slot") {
    CHECK_EQ(layout::LogfmtRow::make(7168).bytes, 7168 * 10 / 8 + 7168 / 128 * 8);
    for (uint64_t hidden = 8; hidden <= 8192; hidden += 8) {
        const auto row = layout::LogfmtRow::make(hidden);
        REQUIRE_LE(layout::LowLatencyMessage::make(16, 8, 36, row.bytes, 0).bytes,
                   layout::LowLatencyMessage::make(16, 8, 36, hidden * 2, 0).bytes);
        REQUIRE_LE(row.low.end(), row.high.offset);
        REQUIRE_LE(row.high.end(), row.scales.offset);
    }
}

}  // namespace
}  // namespace deep_ep::test
