#include "support/low_latency_world.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "core/error.h"
#include "device/algo/formats.h"

namespace deep_ep::test {

namespace {

uint16_t random_bf16(std::mt19937_64& rng) {
    return static_cast<uint16_t>((rng() & 0x8000u) | (0x3c00u + rng() % 0x0500u));
}

float from_bf16(uint16_t bits) { return algo::float_from_bits(static_cast<uint32_t>(bits) << 16); }

runtime::LowLatencyDispatchArgs dispatch_args(const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank) {
    return {problem.args(tensors.wait_stats.data(), &tensors.numbers[0]),
            {.is_fp8 = problem.is_fp8,
             .rounds_scales = problem.rounds_scales,
             .packs_scales = problem.packs_scales,
             .x = reinterpret_cast<const uint8_t*>(tensors.x.data()),
             .topk_idx = tensors.topk_idx.data(),
             .idx_bytes = 8,
             .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
             .recv_x = tensors.recv_x.data(),
             .recv_scales = tensors.recv_scales.data(),
             .recv_count = tensors.recv_count.data(),
             .src_info = tensors.src_info.data(),
             .layout_range = tensors.layout_range.data(),
             .row_of_entry = tensors.row_of_entry.data(),
             .cumulative_stats = tensors.cumulative_stats.data()}};
}

runtime::LowLatencyCombineArgs combine_args(const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank) {
    return {problem.args(tensors.wait_stats.data(), &tensors.numbers[1]),
            {.uses_logfmt = problem.uses_logfmt,
             .x = reinterpret_cast<const uint8_t*>(tensors.y.data()),
             .topk_idx = tensors.topk_idx.data(),
             .idx_bytes = 8,
             .topk_weights = tensors.topk_weights.data(),
             .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
             .row_of_entry = tensors.row_of_entry.data(),
             .combined_x = reinterpret_cast<uint8_t*>(tensors.combined_x.data())}};
}

// What 128 channels become, by the definition of the format.
std::string check_fp8_group(const LowLatencyProblem& problem, const uint16_t* x, const uint8_t* got, float got_scale) {
    float largest = 0.0f;
    for (int i = 0; i < 128; ++i) largest = std::max(largest, std::fabs(from_bf16(x[i])));
    const algo::Fp8Scale scale = algo::fp8_scale(largest, problem.rounds_scales);
    if (got_scale != scale.scale) return concat("scale: expected ", scale.scale, ", got ", got_scale);
    for (int i = 0; i < 128; ++i)
        if (got[i] != algo::fp8_e4m3_from_float(from_bf16(x[i]) * scale.inverse)) return concat("element ", i);
    return "";
}

float received_scale(const LowLatencyProblem& problem, const LowLatencyTensors& target, int expert, int row,
                     int group) {
    const int word = problem.packs_scales ? group / 4 : group;
    const size_t column = static_cast<size_t>(expert * problem.num_scale_words() + word);
    const uint32_t bits =
        target.recv_scales[column * static_cast<size_t>(problem.num_rows()) + static_cast<size_t>(row)];
    return algo::float_from_bits(problem.packs_scales ? (bits >> (8 * (group % 4)) & 0xffu) << 23 : bits);
}

std::string check_received_row(const LowLatencyProblem& problem, const LowLatencyTensors& target, int expert, int row,
                               const LowLatencyTensors& source, int token) {
    const uint16_t* x = source.x.data() + static_cast<size_t>(token) * static_cast<size_t>(problem.hidden);
    const uint8_t* got = target.recv_x.data() + (static_cast<size_t>(expert * problem.num_rows() + row)) *
                                                    static_cast<size_t>(problem.row_bytes());
    if (target.src_info[static_cast<size_t>(expert * problem.num_rows() + row)] != token) return "src_info";
    if (!problem.is_fp8) return std::memcmp(got, x, static_cast<size_t>(problem.row_bytes())) == 0 ? "" : "payload";
    for (int group = 0; group < problem.hidden / 128; ++group) {
        const float scale = received_scale(problem, target, expert, row, group);
        if (auto difference = check_fp8_group(problem, x + group * 128, got + group * 128, scale); !difference.empty())
            return concat("group ", group, ": ", difference);
    }
    return "";
}

std::string check_expert(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks, int rank,
                         int expert) {
    const LowLatencyTensors& target = ranks[static_cast<size_t>(rank)];
    int row = 0;
    for (int source = 0; source < problem.num_ranks(); ++source) {
        const LowLatencyTensors& sender = ranks[static_cast<size_t>(source)];
        const int first_row = row;
        const auto num_topk = static_cast<size_t>(problem.num_topk);
        for (size_t token = 0; token < sender.topk_idx.size() / num_topk; ++token) {
            const auto entries = sender.topk_idx.begin() + static_cast<std::ptrdiff_t>(token * num_topk);
            const int64_t wanted = rank * problem.num_local_experts() + expert;
            if (std::find(entries, entries + problem.num_topk, wanted) == entries + problem.num_topk) continue;
            const auto difference = check_received_row(problem, target, expert, row, sender, static_cast<int>(token));
            if (!difference.empty()) return concat("row ", row, " from rank ", source, ": ", difference);
            ++row;
        }
        const int64_t range = target.layout_range[static_cast<size_t>(expert * problem.num_ranks() + source)];
        if (range >> 32 != first_row || (range & 0xffffffff) != row - first_row)
            return concat("layout_range of ", source);
    }
    return target.recv_count[static_cast<size_t>(expert)] == row ? "" : "recv_count";
}

// What the experts of `rank` have for one token, or nothing.
std::vector<float> part_of_rank(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks,
                                int owner, size_t token, int rank) {
    const auto num_topk = static_cast<size_t>(problem.num_topk);
    const auto hidden = static_cast<size_t>(problem.hidden);
    const LowLatencyTensors& mine = ranks[static_cast<size_t>(owner)];
    const LowLatencyTensors& worker = ranks[static_cast<size_t>(rank)];
    std::vector<float> part;
    for (size_t k = 0; k < num_topk; ++k) {
        const int64_t expert = mine.topk_idx[token * num_topk + k];
        if (expert < 0 || expert / problem.num_local_experts() != rank) continue;
        part.resize(hidden, 0.0f);
        const size_t entry = (static_cast<size_t>(owner * problem.num_max_tokens) + token) * num_topk + k;
        const uint16_t* row = worker.y.data() + static_cast<size_t>(worker.row_of_entry[entry]) * hidden;
        for (size_t h = 0; h < hidden; ++h) part[h] += mine.topk_weights[token * num_topk + k] * from_bf16(row[h]);
    }
    return part;
}

// What arrives of a part: see docs/protocols/low_latency.md.
void send_over_wire(const LowLatencyProblem& problem, std::vector<float>& part) {
    if (!problem.uses_logfmt) {
        for (float& value : part) value = from_bf16(static_cast<uint16_t>(algo::bf16_from_float(value)));
        return;
    }
    for (size_t first = 0; first < part.size(); first += 128) {
        const size_t last = std::min(part.size(), first + 128);
        algo::LogRange range;
        for (size_t h = first; h < last; ++h) range.add(part[h]);
        const algo::LogScale scale = algo::log_scale(range);
        const algo::LogDivisor divisor = algo::log_divisor(scale.step);
        for (size_t h = first; h < last; ++h)
            part[h] = algo::log_decode(algo::log_encode(part[h], scale, divisor), scale);
    }
}

std::vector<float> combined_row(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks,
                                int owner, size_t token) {
    std::vector<float> sums(static_cast<size_t>(problem.hidden), 0.0f);
    for (int rank = 0; rank < problem.num_ranks(); ++rank) {
        auto part = part_of_rank(problem, ranks, owner, token, rank);
        send_over_wire(problem, part);
        for (size_t h = 0; h < part.size(); ++h) sums[h] += part[h];
    }
    return sums;
}

// Launches what `ticket` stands for.
uint64_t launch_phases(Call call, World& world, const LowLatencyProblem& problem, LowLatencyTensors& tensors, int rank,
                       uint64_t ticket) {
    runtime::LowLatency& native = world.buffer(rank).low_latency();
    return call == Call::kDispatch ? native.dispatch(dispatch_args(problem, tensors, rank), ticket, world.stream(rank))
                                   : native.combine(combine_args(problem, tensors, rank), ticket, world.stream(rank));
}

}  // namespace

std::vector<LowLatencyTensors> make_low_latency_inputs(const LowLatencyProblem& problem) {
    std::vector<LowLatencyTensors> ranks(problem.num_tokens.size());
    const auto num_rows = static_cast<size_t>(problem.num_local_experts() * problem.num_rows());
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
        std::mt19937_64 rng(problem.seed * 1000 + rank);
        LowLatencyTensors& tensors = ranks[rank];
        const auto num_tokens = static_cast<size_t>(problem.num_tokens[rank]);
        tensors.x.resize(num_tokens * static_cast<size_t>(problem.hidden));
        for (auto& word : tensors.x) word = problem.is_fp8 ? random_bf16(rng) : static_cast<uint16_t>(rng());
        tensors.topk_idx.resize(num_tokens * static_cast<size_t>(problem.num_topk));
        for (auto& idx : tensors.topk_idx) {
            idx = problem.only_expert >= 0 ? problem.only_expert
                                           : static_cast<int64_t>(rng() % static_cast<uint64_t>(problem.num_experts));
            if (std::bernoulli_distribution(problem.drop_probability)(rng)) idx = -1;
        }
        tensors.topk_weights.resize(tensors.topk_idx.size());
        for (auto& weight : tensors.topk_weights) weight = std::uniform_real_distribution<float>(0.1f, 1.0f)(rng);
        tensors.recv_x.assign(num_rows * static_cast<size_t>(problem.row_bytes()), 0xa5);
        tensors.recv_scales.assign(
            static_cast<size_t>(problem.num_local_experts() * problem.num_scale_words() * problem.num_rows()),
            0xdeadbeef);
        tensors.recv_count.assign(static_cast<size_t>(problem.num_local_experts()), -7);
        tensors.cumulative_stats.assign(tensors.recv_count.size(), 100);
        tensors.src_info.assign(num_rows, -7);
        tensors.layout_range.assign(tensors.recv_count.size() * ranks.size(), -7);
        // And the own entries, where there are several nodes.
        tensors.row_of_entry.assign((ranks.size() + 1) * static_cast<size_t>(problem.num_max_tokens * problem.num_topk),
                                    -7);
        tensors.wait_stats.assign(ranks.size(), 0);
        tensors.y.assign(num_rows * static_cast<size_t>(problem.hidden), 0x7fc0);
        tensors.combined_x.assign(num_tokens * static_cast<size_t>(problem.hidden), 0xfff7);
    }
    return ranks;
}

int64_t low_latency_bytes(const LowLatencyProblem& problem) {
    return runtime::LowLatency::size_hint(problem.num_max_tokens, problem.hidden, problem.num_ranks(),
                                          problem.num_experts);
}

void fill_expert_rows(const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks) {
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
        std::mt19937_64 rng(problem.seed * 77 + rank);
        for (auto& word : ranks[rank].y) word = random_bf16(rng);
    }
}

void send(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks, int rank) {
    LowLatencyTensors& tensors = ranks[static_cast<size_t>(rank)];
    tensors.ticket = launch_phases(call, world, problem, tensors, rank, runtime::kSendPhase);
}

void receive(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
             int rank) {
    LowLatencyTensors& tensors = ranks[static_cast<size_t>(rank)];
    launch_phases(call, world, problem, tensors, rank, tensors.ticket);
}

void launch(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks, int rank,
            Launches launches) {
    if (launches == Launches::kOne) {
        launch_phases(call, world, problem, ranks[static_cast<size_t>(rank)], rank, runtime::kBothPhases);
        return;
    }
    send(call, world, problem, ranks, rank);
    receive(call, world, problem, ranks, rank);
}

void run_on(Call call, World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks,
            const std::vector<int>& callers, Launches launches) {
    for (int rank : callers) launch(call, world, problem, ranks, rank, launches);
    world.run();
}

void abandon_dispatch_of_rank_0(World& world, const LowLatencyProblem& problem, std::vector<LowLatencyTensors>& ranks) {
    world.buffer(0).begin_call();
    launch(Call::kDispatch, world, problem, ranks, 0, Launches::kOne);
    world.buffer(0).abandon_call("low_latency_dispatch: KeyboardInterrupt");
    world.run();
}

uint64_t& low_latency_token_flag(World& world, int owner, int bank, int source, int token) {
    const auto control = layout::ControlLayout::make(static_cast<uint64_t>(world.num_ranks()));
    const uint64_t row = static_cast<uint64_t>(bank * world.num_ranks() + source);
    return *reinterpret_cast<uint64_t*>(
        world.buffer(owner).data() - control.bytes +
        control.low_latency.token_full.at(row * layout::kMaxLowLatencyTokens + static_cast<uint64_t>(token)));
}

std::string check_low_latency_dispatch_of(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks,
                                          int rank) {
    for (int expert = 0; expert < problem.num_local_experts(); ++expert)
        if (auto difference = check_expert(problem, ranks, rank, expert); !difference.empty())
            return concat("rank ", rank, ", expert ", expert, ": ", difference);
    return "";
}

std::string check_low_latency_dispatch(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks) {
    for (int rank = 0; rank < problem.num_ranks(); ++rank)
        if (auto difference = check_low_latency_dispatch_of(problem, ranks, rank); !difference.empty())
            return difference;
    return "";
}

std::string check_low_latency_combine(const LowLatencyProblem& problem, const std::vector<LowLatencyTensors>& ranks) {
    for (int owner = 0; owner < problem.num_ranks(); ++owner) {
        const LowLatencyTensors& mine = ranks[static_cast<size_t>(owner)];
        const auto hidden = static_cast<size_t>(problem.hidden);
        for (size_t token = 0; token < mine.combined_x.size() / hidden; ++token) {
            const auto want = combined_row(problem, ranks, owner, token);
            for (size_t h = 0; h < hidden; ++h)
                if (const uint16_t got = mine.combined_x[token * hidden + h]; got != algo::bf16_from_float(want[h]))
                    return concat("rank ", owner, ", token ", token, ", element ", h, ": expected ", want[h], ", got ",
                                  from_bf16(got));
        }
    }
    return "";
}

std::string low_latency_round_trip(World& world, const LowLatencyProblem& problem, Launches launches) {
    auto ranks = make_low_latency_inputs(problem);
    run_on(Call::kDispatch, world, problem, ranks, all_ranks(problem), launches);
    world.check_all();
    if (auto difference = check_low_latency_dispatch(problem, ranks); !difference.empty()) return difference;
    fill_expert_rows(problem, ranks);
    run_on(Call::kCombine, world, problem, ranks, all_ranks(problem), launches);
    world.check_all();
    return check_low_latency_combine(problem, ranks);
}

std::vector<int> all_ranks(const LowLatencyProblem& problem) {
    std::vector<int> all(problem.num_tokens.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
}

}  // namespace deep_ep::test
