// The slowest obvious version of dispatch and combine, straight from the contract.
#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "device/algo/formats.h"
#include "support/world.h"

namespace deep_ep::test {

namespace {

bool is_sent(const Problem& problem, const RankTensors& source, int token, int rank) {
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    for (int k = 0; k < problem.num_topk; ++k) {
        const int64_t expert = source.topk_idx[static_cast<size_t>(token * problem.num_topk + k)];
        if (expert >= 0 && expert / experts_per_rank == rank) return true;
    }
    return false;
}

// The rows of `rank` in order: (source rank, token).
std::vector<std::pair<int, int>> expected_rows(const Problem& problem, const std::vector<RankTensors>& ranks,
                                               int rank) {
    std::vector<std::pair<int, int>> rows;
    for (int source = 0; source < problem.num_ranks(); ++source)
        for (int token = 0; token < problem.num_tokens[static_cast<size_t>(source)]; ++token)
            if (is_sent(problem, ranks[static_cast<size_t>(source)], token, rank)) rows.emplace_back(source, token);
    return rows;
}

template <class T>
bool is_equal(const std::vector<T>& a, size_t a_row, const std::vector<T>& b, size_t b_row, size_t width) {
    return width == 0 || std::memcmp(a.data() + a_row * width, b.data() + b_row * width, width * sizeof(T)) == 0;
}

std::string check_topk(const Problem& problem, const RankTensors& source, size_t token, const RankTensors& target,
                       size_t row, int rank) {
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    const auto num_topk = static_cast<size_t>(problem.num_topk);
    for (size_t k = 0; k < num_topk; ++k) {
        const int64_t expert = source.topk_idx[token * num_topk + k];
        const bool is_here = expert >= 0 && expert / experts_per_rank == rank;
        const int64_t id = is_here ? expert % experts_per_rank : -1;
        const float weight = is_here ? source.topk_weights[token * num_topk + k] : 0.0f;
        if (target.recv_topk_idx[row * num_topk + k] != id) return concat("recv_topk_idx, row ", row, ", k ", k);
        if (target.recv_topk_weights[row * num_topk + k] != weight) return concat("recv_topk_weights, row ", row);
    }
    return "";
}

std::string check_counts(const Problem& problem, const std::vector<RankTensors>& ranks, int rank, size_t num_rows) {
    const RankTensors& target = ranks[static_cast<size_t>(rank)];
    if (static_cast<size_t>(target.num_recv_tokens) != num_rows)
        return concat("num_recv_tokens: expected ", num_rows, ", got ", target.num_recv_tokens);
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    for (int local = 0; local < experts_per_rank; ++local) {
        int64_t count = 0;
        for (const RankTensors& source : ranks)
            count += std::count(source.topk_idx.begin(), source.topk_idx.end(), rank * experts_per_rank + local);
        const int64_t aligned =
            (count + problem.expert_alignment - 1) / problem.expert_alignment * problem.expert_alignment;
        if (target.num_recv_per_expert[static_cast<size_t>(local)] != aligned) return concat("count of expert ", local);
    }
    return "";
}

std::string check_row(const Problem& problem, const std::vector<RankTensors>& ranks, int rank, size_t row,
                      std::pair<int, int> origin, bool is_cached) {
    const RankTensors& target = ranks[static_cast<size_t>(rank)];
    const RankTensors& source = ranks[static_cast<size_t>(origin.first)];
    const auto token = static_cast<size_t>(origin.second);
    if (!is_equal(target.recv_x, row, source.x, token, static_cast<size_t>(problem.hidden)))
        return concat("recv_x, row ", row, " from rank ", origin.first, ", token ", token);
    if (!is_equal(target.recv_scales, row, source.scales, token, static_cast<size_t>(problem.num_scales)))
        return concat("recv_scales, row ", row);
    if (target.recv_src_idx[row] != origin.second) return concat("recv_src_idx, row ", row);
    return is_cached ? "" : check_topk(problem, source, token, target, row, rank);
}

std::string check_unused(const Problem& problem, const RankTensors& target, size_t num_rows) {
    for (size_t i = num_rows * static_cast<size_t>(problem.num_topk); i < target.recv_topk_idx.size(); ++i)
        if (target.recv_topk_idx[i] != -1 || target.recv_topk_weights[i] != 0.0f)
            return concat("unused row, entry ", i);
    return "";
}

// The sum of what the ranks of one node add, in rank order; 0 where none of them has a row.
template <class ValueAt>
float sum_of_node(const Problem& problem, size_t node, size_t num_ranks, const ValueAt& value_at) {
    const size_t per_node = problem.ranks_per_node > 0 ? static_cast<size_t>(problem.ranks_per_node) : num_ranks;
    float sum = 0.0f;
    for (size_t rank = node * per_node; rank < (node + 1) * per_node; ++rank) sum += value_at(rank);
    return sum;
}

// The owner's own node first, in FP32; then the sums of the others in node order, each as `rounded` on its way.
template <class ValueAt, class Rounded>
float sum_of_nodes(const Problem& problem, size_t owner, size_t num_ranks, const ValueAt& value_at,
                   const Rounded& rounded) {
    const size_t per_node = problem.ranks_per_node > 0 ? static_cast<size_t>(problem.ranks_per_node) : num_ranks;
    float sum = sum_of_node(problem, owner / per_node, num_ranks, value_at);
    for (size_t node = 0; node < num_ranks / per_node; ++node)
        if (node != owner / per_node) sum += rounded(sum_of_node(problem, node, num_ranks, value_at));
    return sum;
}

float float_of_bf16(uint32_t word) { return algo::float_from_bits(word << 16); }

// FP32, ranks in ascending order (and nodes, where there are several), then the biases, one rounding.
uint16_t combined_element(const Problem& problem, const std::vector<RankTensors>& ranks, int owner, size_t token,
                          const std::vector<std::vector<size_t>>& rows, size_t h) {
    const auto hidden = static_cast<size_t>(problem.hidden);
    const auto value_at = [&](size_t rank) {
        return rows[rank][token] == SIZE_MAX ? 0.0f : float_of_bf16(ranks[rank].y[rows[rank][token] * hidden + h]);
    };
    float sum = sum_of_nodes(problem, static_cast<size_t>(owner), ranks.size(), value_at,
                             [](float of_node) { return float_of_bf16(algo::bf16_from_float(of_node)); });
    for (int i = 0; i < problem.num_biases; ++i)
        sum += algo::float_from_bits(
            static_cast<uint32_t>(ranks[static_cast<size_t>(owner)].bias[i][token * hidden + h]) << 16);
    return static_cast<uint16_t>(algo::bf16_from_float(sum));
}

std::string check_owner(const Problem& problem, const std::vector<RankTensors>& ranks, int owner) {
    const RankTensors& tensors = ranks[static_cast<size_t>(owner)];
    const auto num_tokens = static_cast<size_t>(problem.num_tokens[static_cast<size_t>(owner)]);
    const auto hidden = static_cast<size_t>(problem.hidden);
    const auto num_topk = static_cast<size_t>(problem.num_topk);
    std::vector<std::vector<size_t>> rows(ranks.size(), std::vector<size_t>(num_tokens, SIZE_MAX));
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
        const auto expected = expected_rows(problem, ranks, static_cast<int>(rank));
        for (size_t row = 0; row < expected.size(); ++row)
            if (expected[row].first == owner) rows[rank][static_cast<size_t>(expected[row].second)] = row;
    }
    for (size_t token = 0; token < num_tokens; ++token) {
        for (size_t h = 0; h < hidden; ++h)
            if (tensors.combined_x[token * hidden + h] != combined_element(problem, ranks, owner, token, rows, h))
                return concat("combined_x of rank ", owner, ", token ", token, ", element ", h);
        for (size_t k = 0; k < num_topk; ++k) {
            const auto value_at = [&](size_t rank) {
                return rows[rank][token] == SIZE_MAX ? 0.0f : ranks[rank].y_weights[rows[rank][token] * num_topk + k];
            };
            const float sum = sum_of_nodes(problem, static_cast<size_t>(owner), ranks.size(), value_at,
                                           [](float of_node) { return of_node; });
            if (tensors.combined_weights[token * num_topk + k] != sum)
                return concat("combined_topk_weights of rank ", owner, ", token ", token);
        }
    }
    return "";
}

}  // namespace

std::string check_dispatch(const Problem& problem, const std::vector<RankTensors>& ranks, bool is_cached) {
    for (int rank = 0; rank < problem.num_ranks(); ++rank) {
        const auto rows = expected_rows(problem, ranks, rank);
        std::string difference = check_counts(problem, ranks, rank, rows.size());
        for (size_t row = 0; row < rows.size() && difference.empty(); ++row)
            difference = check_row(problem, ranks, rank, row, rows[row], is_cached);
        if (difference.empty()) difference = check_unused(problem, ranks[static_cast<size_t>(rank)], rows.size());
        if (!difference.empty()) return concat("rank ", rank, ": ", difference);
    }
    return "";
}

std::string check_combine(const Problem& problem, const std::vector<RankTensors>& ranks) {
    for (int owner = 0; owner < problem.num_ranks(); ++owner)
        if (std::string difference = check_owner(problem, ranks, owner); !difference.empty()) return difference;
    return "";
}

}  // namespace deep_ep::test
