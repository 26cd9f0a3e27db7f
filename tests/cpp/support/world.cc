#include "support/world.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "core/error.h"

namespace deep_ep::test {

simt::SchedulerOptions seeded(uint64_t seed) {
    simt::SchedulerOptions options;
    options.seed = seed;
    return options;
}

simt::SchedulerOptions impatient() {
    simt::SchedulerOptions options;
    options.idle = simt::IdlePolicy::kAdvanceClock;
    return options;
}

namespace {

constexpr uint16_t kPoison16 = 0xfff7;
constexpr uint32_t kPoison32 = 0xdeadbeefu;

float random_float(std::mt19937_64& rng) { return std::uniform_real_distribution<float>(-2.0f, 2.0f)(rng); }

// A bfloat16 of moderate size: combine's sums must be comparable.
uint16_t random_bf16(std::mt19937_64& rng) {
    const uint16_t sign = static_cast<uint16_t>(rng() & 0x8000u);
    return static_cast<uint16_t>(sign | (0x3e00u + rng() % 0x0300u));
}

void fill_routing(const Problem& problem, std::mt19937_64& rng, RankTensors& tensors) {
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    for (auto& idx : tensors.topk_idx) {
        const bool is_dropped = std::bernoulli_distribution(problem.drop_probability)(rng);
        const auto any = static_cast<int64_t>(rng() % static_cast<uint64_t>(problem.num_experts));
        const int64_t hot = problem.only_rank * experts_per_rank + any % experts_per_rank;
        idx = is_dropped ? -1 : problem.only_rank >= 0 ? hot : any;
    }
}

}  // namespace

World::World(int num_ranks, int64_t num_data_bytes, const simt::SchedulerOptions& options, double timeout_s,
             int64_t num_low_latency_bytes, bool is_shrinkable, const std::vector<simt::DeviceOptions>& devices,
             int64_t num_lend_bytes, const WorldRail* rail)
    : rail_(rail), scheduler_(std::make_unique<simt::Scheduler>(options)) {
    std::vector<simt::SimtDevice*> all;
    for (int rank = 0; rank < num_ranks; ++rank) {
        const simt::DeviceOptions& device = devices[static_cast<size_t>(rank) % devices.size()];
        devices_.push_back(std::make_shared<simt::SimtDevice>(*scheduler_, rank, device));
        all.push_back(devices_.back().get());
    }
    if (rail != nullptr) rail->begin(all);
    std::vector<std::string> handles, addresses;
    for (int rank = 0; rank < num_ranks; ++rank) {
        const auto& device = devices_[static_cast<size_t>(rank)];
        runtime::BufferOptions buffer{.rank = rank,
                                      .num_ranks = num_ranks,
                                      .num_data_bytes = num_data_bytes,
                                      .num_low_latency_bytes = num_low_latency_bytes,
                                      .timeout_s = timeout_s,
                                      .warn_s = timeout_s / 2,
                                      .is_shrinkable = is_shrinkable,
                                      .num_lend_bytes = num_lend_bytes};
        if (rail != nullptr) {
            buffer.ranks_per_node = rail->ranks_per_node;
            buffer.num_rail_bytes = 1 << 20;
            buffer.make_engine = rail->make_engine;
        }
        buffers_.push_back(std::make_unique<runtime::Buffer>(device, buffer));
        streams_.push_back(device->create_stream());
        handles.push_back(buffers_.back()->export_handle());
        addresses.push_back(buffers_.back()->rail_address());
    }
    for (auto& buffer : buffers_) buffer->connect(handles);
    for (auto& buffer : buffers_) buffer->connect_rail(addresses);
}

World::~World() {
    for (auto& buffer : buffers_) buffer->destroy(0.0);
    if (rail_ != nullptr) rail_->end();
    for (size_t i = 0; i < streams_.size(); ++i) devices_[i]->destroy_stream(streams_[i]);
}

void World::run() {
    if (rail_ == nullptr) return scheduler_->run_until_idle();
    rail_->run(*scheduler_, [&] {
        for (size_t rank = 0; rank < devices_.size(); ++rank) devices_[rank]->synchronize_stream(streams_[rank]);
    });
}

void World::check_all() {
    for (const auto& buffer : buffers_) buffer->check();
}

std::vector<RankTensors> make_inputs(const Problem& problem) {
    std::vector<RankTensors> ranks(problem.num_tokens.size());
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
        std::mt19937_64 rng(problem.seed * 1000 + rank);
        RankTensors& tensors = ranks[rank];
        const auto num_tokens = static_cast<size_t>(problem.num_tokens[rank]);
        tensors.x.resize(num_tokens * static_cast<size_t>(problem.hidden));
        for (auto& word : tensors.x) word = static_cast<uint16_t>(rng());  // any bit pattern must arrive as it is
        tensors.scales.resize(num_tokens * static_cast<size_t>(problem.num_scales));
        for (auto& word : tensors.scales) word = static_cast<uint32_t>(rng());
        tensors.topk_idx.resize(num_tokens * static_cast<size_t>(problem.num_topk));
        fill_routing(problem, rng, tensors);
        tensors.topk_weights.resize(tensors.topk_idx.size());
        for (auto& weight : tensors.topk_weights) weight = random_float(rng);
        tensors.num_tokens_per_rank.assign(ranks.size(), -7);
        tensors.num_tokens_per_expert.assign(static_cast<size_t>(problem.num_experts), -7);
        tensors.is_token_in_rank.assign(num_tokens * ranks.size(), 0xcc);
        tensors.rank_prefix_matrix.assign(ranks.size() * ranks.size(), -7);
        tensors.send_head.assign(num_tokens * ranks.size(), -7);
    }
    return ranks;
}

void prepare_recv(const Problem& problem, RankTensors& tensors, int64_t num_rows) {
    const auto rows = static_cast<size_t>(num_rows);
    tensors.recv_x.assign(rows * static_cast<size_t>(problem.hidden), kPoison16);
    tensors.recv_scales.assign(rows * static_cast<size_t>(problem.num_scales), kPoison32);
    tensors.recv_topk_idx.assign(rows * static_cast<size_t>(problem.num_topk), 12345);
    tensors.recv_topk_weights.assign(rows * static_cast<size_t>(problem.num_topk), 12345.0f);
    tensors.recv_src_idx.assign(rows, -7);
}

void prepare_combine(const Problem& problem, RankTensors& tensors, int rank) {
    std::mt19937_64 rng(problem.seed * 77 + static_cast<uint64_t>(rank));
    const auto idx = static_cast<size_t>(rank);
    const auto hidden = static_cast<size_t>(problem.hidden);
    const auto num_tokens = static_cast<size_t>(problem.num_tokens[idx]);
    const auto num_rows = static_cast<size_t>(tensors.num_recv_tokens);
    tensors.y.resize(num_rows * hidden);
    for (auto& word : tensors.y) word = random_bf16(rng);
    tensors.y_weights.resize(num_rows * static_cast<size_t>(problem.num_topk));
    for (auto& weight : tensors.y_weights) weight = random_float(rng);
    for (int i = 0; i < problem.num_biases; ++i) {
        tensors.bias[i].resize(num_tokens * hidden);
        for (auto& word : tensors.bias[i]) word = random_bf16(rng);
    }
    tensors.combined_x.assign(num_tokens * hidden, kPoison16);
    tensors.combined_weights.assign(num_tokens * static_cast<size_t>(problem.num_topk), 12345.0f);
}

void prepare_combine(const Problem& problem, std::vector<RankTensors>& ranks) {
    for (size_t rank = 0; rank < ranks.size(); ++rank) prepare_combine(problem, ranks[rank], static_cast<int>(rank));
}

kernels::NotifyArgs notify_args(const Problem& problem, RankTensors& tensors, int rank) {
    return {.num_tokens_per_rank = tensors.num_tokens_per_rank.data(),
            .num_tokens_per_expert = tensors.num_tokens_per_expert.data(),
            .num_experts = problem.num_experts,
            .expert_alignment = problem.expert_alignment,
            .rank_prefix_matrix = tensors.rank_prefix_matrix.data(),
            .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
            .row_bytes = 2 * static_cast<uint32_t>(problem.hidden),
            .num_topk = problem.num_topk,
            .num_scales = problem.num_scales};
}

kernels::DispatchArgs dispatch_args(const Problem& problem, RankTensors& tensors, int rank, bool is_cached) {
    return {.x = reinterpret_cast<const uint8_t*>(tensors.x.data()),
            .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
            .row_bytes = 2 * static_cast<uint32_t>(problem.hidden),
            .scales = tensors.scales.data(),
            .num_scales = problem.num_scales,
            .scale_stride_token = problem.num_scales,
            .scale_stride_scale = 1,
            .topk_idx = tensors.topk_idx.data(),
            .topk_weights = tensors.topk_weights.data(),
            .num_topk = is_cached ? 0 : problem.num_topk,
            .idx_bytes = 8,
            .num_experts = problem.num_experts,
            .is_cached = is_cached,
            .num_tokens_per_rank = nullptr,
            .num_tokens_per_expert = nullptr,
            .is_token_in_rank = is_cached ? nullptr : tensors.is_token_in_rank.data(),
            .rank_prefix_matrix = tensors.rank_prefix_matrix.data(),
            .send_head = tensors.send_head.data(),
            .recv_x = reinterpret_cast<uint8_t*>(tensors.recv_x.data()),
            .recv_scales = tensors.recv_scales.data(),
            .recv_topk_idx = tensors.recv_topk_idx.data(),
            .recv_topk_weights = tensors.recv_topk_weights.data(),
            .recv_src_idx = tensors.recv_src_idx.data(),
            .num_recv_rows = static_cast<int>(tensors.recv_src_idx.size()),
            .is_worst_case = !is_cached && problem.num_extra_rows > 0,
            .expert_alignment = 0};
}

kernels::CombineArgs combine_args(const Problem& problem, RankTensors& tensors, int rank) {
    const auto bias = [&](int i) -> const uint8_t* {
        return i < problem.num_biases ? reinterpret_cast<const uint8_t*>(tensors.bias[i].data()) : nullptr;
    };
    return {.x = reinterpret_cast<const uint8_t*>(tensors.y.data()),
            .num_rows = static_cast<int>(tensors.num_recv_tokens),
            .hidden = problem.hidden,
            .topk_weights = tensors.y_weights.data(),
            .num_topk = problem.num_topk,
            .bias = {bias(0), bias(1)},
            .rank_prefix_matrix = tensors.rank_prefix_matrix.data(),
            .send_head = tensors.send_head.data(),
            .src_idx = tensors.recv_src_idx.data(),
            .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
            .combined_x = reinterpret_cast<uint8_t*>(tensors.combined_x.data()),
            .combined_topk_weights = tensors.combined_weights.data()};
}

void World::launch_layout(const Problem& problem, RankTensors& tensors, int rank) {
    buffer(rank).high_throughput().get_dispatch_layout({.topk_idx = tensors.topk_idx.data(),
                                                        .idx_bytes = 8,
                                                        .num_tokens = problem.num_tokens[static_cast<size_t>(rank)],
                                                        .num_topk = problem.num_topk,
                                                        .num_experts = problem.num_experts,
                                                        .num_nodes = 1,
                                                        .num_tokens_per_rank = tensors.num_tokens_per_rank.data(),
                                                        .num_tokens_per_node = nullptr,
                                                        .num_tokens_per_expert = tensors.num_tokens_per_expert.data(),
                                                        .is_token_in_rank = tensors.is_token_in_rank.data()},
                                                       stream(rank));
}

void World::layout(const Problem& problem, std::vector<RankTensors>& ranks) {
    for (int rank = 0; rank < num_ranks(); ++rank) launch_layout(problem, ranks[static_cast<size_t>(rank)], rank);
    run();
}

void World::launch_notify(const Problem& problem, RankTensors& tensors, int rank) {
    buffer(rank).high_throughput().notify_dispatch(notify_args(problem, tensors, rank), stream(rank));
}

std::unique_ptr<runtime::LentMemory> World::lend(int rank, int64_t num_bytes) {
    auto lent = buffer(rank).high_throughput().loans().lend({num_bytes}, nullptr, false);
    return lent.empty() ? nullptr : std::move(lent.front());
}

template <class T> T* World::lend(RankTensors& tensors, int rank, std::vector<T>& data) {
    const size_t num_bytes = data.size() * sizeof(T);
    if (num_bytes == 0) return nullptr;
    for (const RankTensors::Lent& lent : tensors.lent)
        if (lent.data == data.data()) return reinterpret_cast<T*>(lent.memory->address());
    std::shared_ptr<runtime::LentMemory> memory = lend(rank, static_cast<int64_t>(num_bytes));
    EP_CHECK(memory != nullptr, "the test lends more than its world has room for");
    std::memcpy(memory->address(), data.data(), num_bytes);
    tensors.lent.push_back({memory, data.data(), num_bytes});
    return reinterpret_cast<T*>(memory->address());
}

void World::collect(std::vector<RankTensors>& ranks) {
    for (RankTensors& tensors : ranks) {
        for (const RankTensors::Lent& lent : tensors.lent)
            std::memcpy(lent.data, lent.memory->address(), lent.num_bytes);
        tensors.lent.clear();
    }
}

void World::launch_dispatch(const Problem& problem, RankTensors& tensors, int rank, Counts counts) {
    kernels::DispatchArgs args = dispatch_args(problem, tensors, rank, counts == Counts::kKnown);
    if (counts == Counts::kUnknown || counts == Counts::kGuessed) {
        args.num_tokens_per_rank = tensors.num_tokens_per_rank.data();
        args.num_tokens_per_expert = tensors.num_tokens_per_expert.data();
    }
    args.is_worst_case = counts != Counts::kGuessed && problem.num_extra_rows > 0;
    if (counts == Counts::kGuessed) args.expert_alignment = problem.expert_alignment;
    if (problem.lends(rank)) {
        args.recv_x = reinterpret_cast<uint8_t*>(lend(tensors, rank, tensors.recv_x));
        args.recv_scales = lend(tensors, rank, tensors.recv_scales);
        args.recv_topk_idx = lend(tensors, rank, tensors.recv_topk_idx);
        args.recv_topk_weights = lend(tensors, rank, tensors.recv_topk_weights);
        args.recv_src_idx = lend(tensors, rank, tensors.recv_src_idx);
    }
    buffer(rank).high_throughput().dispatch(args, problem.num_sms, stream(rank));
}

void World::combine_on(const Problem& problem, std::vector<RankTensors>& ranks, std::initializer_list<int> callers) {
    for (int rank : callers) {
        prepare_combine(problem, ranks[static_cast<size_t>(rank)], rank);
        launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    }
    run();
}

void World::launch_combine(const Problem& problem, RankTensors& tensors, int rank) {
    kernels::CombineArgs args = combine_args(problem, tensors, rank);
    if (problem.lends(rank)) args.x = reinterpret_cast<const uint8_t*>(lend(tensors, rank, tensors.y));
    if (problem.lends_sums(rank)) args.combined_x = reinterpret_cast<uint8_t*>(lend(tensors, rank, tensors.combined_x));
    buffer(rank).high_throughput().combine(args, problem.num_sms, stream(rank));
}

void World::dispatch(const Problem& problem, std::vector<RankTensors>& ranks) {
    if (problem.num_extra_rows > 0)
        launch_worst_case(problem, ranks);
    else
        launch_fresh(problem, ranks);
    run();
    collect(ranks);
    check_all();
}

std::vector<RankTensors> World::dispatched(const Problem& problem) {
    auto ranks = make_inputs(problem);
    layout(problem, ranks);
    dispatch(problem, ranks);
    return ranks;
}

// What the host would learn from a count exchange.
void World::count_rows(const Problem& problem, std::vector<RankTensors>& ranks) const {
    const int num_local_experts = problem.num_experts / num_ranks();
    for (int rank = 0; rank < num_ranks(); ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        tensors.num_recv_tokens = 0;
        for (const RankTensors& source : ranks)
            tensors.num_recv_tokens += source.num_tokens_per_rank[static_cast<size_t>(rank)];
        tensors.num_recv_per_expert.clear();
        for (int e = rank * num_local_experts; e < (rank + 1) * num_local_experts; ++e) {
            int sum = 0;
            for (const RankTensors& source : ranks) sum += source.num_tokens_per_expert[static_cast<size_t>(e)];
            const int alignment = problem.expert_alignment;
            tensors.num_recv_per_expert.push_back((sum + alignment - 1) / alignment * alignment);
        }
    }
}

void World::launch_worst_case(const Problem& problem, std::vector<RankTensors>& ranks) {
    count_rows(problem, ranks);
    for (RankTensors& tensors : ranks) prepare_recv(problem, tensors, tensors.num_recv_tokens + problem.num_extra_rows);
    for (int rank = 0; rank < num_ranks(); ++rank)
        launch_dispatch(problem, ranks[static_cast<size_t>(rank)], rank, Counts::kUnknown);
}

void World::launch_without_room(const Problem& problem, std::vector<RankTensors>& ranks, int short_rank,
                                Counts counts) {
    for (int rank = 0; rank < num_ranks(); ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        prepare_recv(problem, tensors, tensors.num_recv_tokens - (rank == short_rank ? 1 : 0));
        launch_dispatch(problem, tensors, rank, counts);
    }
}

void World::dispatch_guessed(const Problem& problem, std::vector<RankTensors>& ranks,
                             const std::vector<int>& num_spare_rows, bool lends_again) {
    count_rows(problem, ranks);
    for (int rank = 0; rank < num_ranks(); ++rank) {
        const auto idx = static_cast<size_t>(rank);
        prepare_recv(problem, ranks[idx], std::max<int64_t>(0, ranks[idx].num_recv_tokens + num_spare_rows[idx]));
        launch_dispatch(problem, ranks[idx], rank, Counts::kGuessed);
    }
    const auto is_short = [&](int rank) { return num_spare_rows[static_cast<size_t>(rank)] < 0; };
    std::vector<int> order;  // the hosts of the others wait for what these lend in the end
    for (bool comes_first : {true, false})
        for (int rank = 0; rank < num_ranks(); ++rank)
            if (is_short(rank) == comes_first) order.push_back(rank);
    for (int rank : order) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        const runtime::RecvCounts counts = wait_counts(rank);
        EP_CHECK(
            counts.num_tokens == tensors.num_recv_tokens && counts.num_tokens_per_expert == tensors.num_recv_per_expert,
            "the host of rank ", rank, " was told other counts than it should have been");
        if (counts.num_tokens <= static_cast<int64_t>(tensors.recv_src_idx.size())) continue;
        tensors.lent.clear();
        prepare_recv(problem, tensors, counts.num_tokens);
        Problem rest = problem;
        if (!lends_again) rest.lending_ranks = 0;
        launch_dispatch(rest, tensors, rank, Counts::kExchanged);
    }
    run();
    collect(ranks);
    for (int rank = 0; rank < num_ranks(); ++rank) {
        buffer(rank).check();
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        const auto num_rows = static_cast<size_t>(tensors.num_recv_tokens);
        tensors.recv_x.resize(num_rows * static_cast<size_t>(problem.hidden));
        tensors.recv_scales.resize(num_rows * static_cast<size_t>(problem.num_scales));
        tensors.recv_topk_idx.resize(num_rows * static_cast<size_t>(problem.num_topk));
        tensors.recv_topk_weights.resize(tensors.recv_topk_idx.size());
        tensors.recv_src_idx.resize(num_rows);
    }
}

void World::launch_fresh(const Problem& problem, std::vector<RankTensors>& ranks) {
    for (int rank = 0; rank < num_ranks(); ++rank) launch_notify(problem, ranks[static_cast<size_t>(rank)], rank);
    for (int rank = 0; rank < num_ranks(); ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        const runtime::RecvCounts counts = wait_counts(rank);
        tensors.num_recv_tokens = counts.num_tokens;
        tensors.num_recv_per_expert = counts.num_tokens_per_expert;
        prepare_recv(problem, tensors, counts.num_tokens);
        launch_dispatch(problem, tensors, rank, Counts::kExchanged);
    }
}

void World::dispatch_cached(const Problem& problem, std::vector<RankTensors>& ranks) {
    for (int rank = 0; rank < num_ranks(); ++rank) {
        RankTensors& tensors = ranks[static_cast<size_t>(rank)];
        prepare_recv(problem, tensors, tensors.num_recv_tokens);
        launch_dispatch(problem, tensors, rank, Counts::kKnown);
    }
    run();
    collect(ranks);
    check_all();
}

void World::combine(const Problem& problem, std::vector<RankTensors>& ranks) {
    prepare_combine(problem, ranks);
    for (int rank = 0; rank < num_ranks(); ++rank) launch_combine(problem, ranks[static_cast<size_t>(rank)], rank);
    run();
    collect(ranks);
    check_all();
}

namespace {

template <class T> bool is_void(const std::vector<T>& output) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(output.data());
    return std::all_of(bytes, bytes + output.size() * sizeof(T), [](uint8_t byte) { return byte == 0xff; });
}

}  // namespace

std::string check_void_dispatch(const RankTensors& tensors, bool is_cached) {
    if (!is_void(tensors.recv_x)) return "recv_x";
    if (!is_void(tensors.recv_scales)) return "recv_scales";
    if (is_cached) return "";
    if (!is_void(tensors.recv_topk_idx)) return "recv_topk_idx";
    if (!is_void(tensors.recv_topk_weights)) return "recv_topk_weights";
    return is_void(tensors.recv_src_idx) ? "" : "recv_src_idx";
}

std::string check_void_combine(const RankTensors& tensors) {
    if (!is_void(tensors.combined_x)) return "combined_x";
    return is_void(tensors.combined_weights) ? "" : "combined_weights";
}

int64_t num_stray_bytes(const uint8_t* whole, const std::vector<uint8_t>& before, const RankTensors& tensors) {
    std::vector<bool> is_lent(before.size());
    for (const RankTensors::Lent& lent : tensors.lent) {
        const auto begin = is_lent.begin() + (lent.memory->address() - whole);
        std::fill(begin, begin + static_cast<int64_t>(lent.num_bytes), true);
    }
    int64_t num_stray = 0;
    for (size_t i = 0; i < before.size(); ++i) num_stray += !is_lent[i] && whole[i] != before[i] ? 1 : 0;
    return num_stray;
}

std::string round_trip(World& world, const Problem& problem) {
    auto ranks = make_inputs(problem);
    world.layout(problem, ranks);
    world.dispatch(problem, ranks);
    if (std::string difference = check_dispatch(problem, ranks); !difference.empty()) return difference;
    world.combine(problem, ranks);
    return check_combine(problem, ranks);
}

}  // namespace deep_ep::test
