#include "internode/internode_world.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "core/error.h"
#include "device/simt/happens_before.h"

namespace deep_ep::test {

namespace {

uint64_t to_ns(double s) { return static_cast<uint64_t>(s * 1e9); }

// What get_dispatch_layout tells, and the same by node.
void fill_routing(const Problem& problem, int ranks_per_node, RankTensors& tensors, RailTensors& rail) {
    const auto num_ranks = static_cast<size_t>(problem.num_ranks());
    const auto num_nodes = num_ranks / static_cast<size_t>(ranks_per_node);
    const auto num_topk = static_cast<size_t>(problem.num_topk);
    const int experts_per_rank = problem.num_experts / problem.num_ranks();
    tensors.num_tokens_per_rank.assign(num_ranks, 0);
    tensors.num_tokens_per_expert.assign(static_cast<size_t>(problem.num_experts), 0);
    rail.num_tokens_per_node.assign(num_nodes, 0);
    std::fill(tensors.is_token_in_rank.begin(), tensors.is_token_in_rank.end(), uint8_t{0});
    const size_t num_tokens = num_topk == 0 ? 0 : tensors.topk_idx.size() / num_topk;
    for (size_t token = 0; token < num_tokens; ++token) {
        std::vector<bool> nodes(num_nodes);
        for (size_t k = 0; k < num_topk; ++k) {
            const int64_t expert = tensors.topk_idx[token * num_topk + k];
            if (expert < 0) continue;
            ++tensors.num_tokens_per_expert[static_cast<size_t>(expert)];
            const auto rank = static_cast<size_t>(expert / experts_per_rank);
            uint8_t& is_in_rank = tensors.is_token_in_rank[token * num_ranks + rank];
            if (is_in_rank == 0) ++tensors.num_tokens_per_rank[rank];
            is_in_rank = 1;
            const size_t node = rank / static_cast<size_t>(ranks_per_node);
            if (!nodes[node]) ++rail.num_tokens_per_node[node];
            nodes[node] = true;
        }
    }
}

}  // namespace

InternodeCall::InternodeCall(const Problem& given, const InternodeOptions& options)
    : problem(given), ranks(make_inputs(given)), rails(ranks.size()) {
    problem.ranks_per_node = options.ranks_per_node;
    const auto num_nodes = static_cast<size_t>(options.num_nodes);
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
        fill_routing(problem, options.ranks_per_node, ranks[rank], rails[rank]);
        ranks[rank].rank_prefix_matrix.assign(ranks.size() * static_cast<size_t>(options.ranks_per_node), -7);
        rails[rank].recv_rank_prefix.assign(ranks.size(), -7);
        rails[rank].rail_prefix.assign(num_nodes, -7);
        rails[rank].send_rail_head.assign(static_cast<size_t>(problem.num_tokens[rank]) * num_nodes, -7);
    }
}

InternodeWorld::InternodeWorld(const InternodeOptions& options, const Problem& largest)
    : options_(options),
      control_(layout::ControlLayout::make(static_cast<uint64_t>(options.ranks_per_node),
                                           static_cast<uint64_t>(options.num_nodes))),
      rail_control_(layout::RailControl::make(static_cast<uint64_t>(options.num_nodes),
                                              static_cast<uint64_t>(options.ranks_per_node))),
      scheduler_(std::make_unique<simt::Scheduler>(options.scheduler)) {
    const auto num_nodes = static_cast<uint64_t>(options.num_nodes);
    const auto row_bytes = static_cast<uint64_t>(largest.hidden) * 2;
    const auto num_topk = static_cast<uint64_t>(largest.num_topk),
               num_scales = static_cast<uint64_t>(largest.num_scales);
    const auto slot = layout::SlotLayout::for_dispatch(row_bytes, num_topk, num_scales);
    num_data_bytes_ = layout::WindowLayout::bytes_for(static_cast<uint64_t>(options.ranks_per_node), slot.bytes,
                                                      options.window, num_nodes);
    const auto rail_slot = layout::SlotLayout::for_dispatch(row_bytes, num_topk, num_scales,
                                                            static_cast<uint64_t>(options.ranks_per_node));
    num_rail_bytes_ = layout::RailWindow::bytes_for(num_nodes, rail_slot.bytes, options.rail_slots);
    std::vector<simt::SimtDevice*> devices;
    for (int rank = 0; rank < num_ranks(); ++rank) {
        Rank& here = ranks_.emplace_back();
        here.device = std::make_shared<simt::SimtDevice>(*scheduler_, rank, options.device);
        here.stream = here.device->create_stream();
        here.heap = static_cast<uint8_t*>(here.device->allocate(lend_offset() + options.lend_bytes));
        here.local = dev::DeviceArray<layout::LocalState>(here.device, 1);
        here.wait_cells = {here.device, static_cast<size_t>(layout::num_wait_cells(num_ranks()))};
        layout::LocalState* const local = here.local.get();
        layout::WaitCell* const cells = here.wait_cells.get();
        const uint64_t warn_ns = to_ns(options.timeout_s / 2);
        here.device->copy_now(&local->wait_cells, &cells, sizeof(cells));
        here.device->copy_now(&local->warn_ns, &warn_ns, sizeof(warn_ns));
        here.counters = dev::DeviceArray<uint8_t>(here.device, layout::RailCounters::make(num_nodes).bytes);
        here.status = dev::HostMappedObject<layout::HostStatus>(here.device);
        here.counts = dev::HostMappedObject<layout::HostCounts>(here.device);
        devices.push_back(here.device.get());
    }
    network_ = std::make_unique<rail::sim::SimNetwork>(
        devices, rail::sim::SimOptions{.num_ranks = num_ranks(),
                                       .window_bytes = rail_control_.bytes + num_rail_bytes_,
                                       .seed = options.network_seed,
                                       .steps = options.num_nodes * options.num_nodes * options.ranks_per_node,
                                       .max_posted = options.max_posted,
                                       .is_near = options.is_near});
}

InternodeWorld::~InternodeWorld() {
    {
        const simt::hb::Quiet quiet;  // its messages have contexts of their own, which nothing orders before this
        network_.reset();
    }
    for (Rank& rank : ranks_) {
        rank.device->free(rank.heap);
        rank.device->destroy_stream(rank.stream);
    }
}

uint64_t InternodeWorld::lend_offset() const {
    return layout::align_up(control_.bytes + num_data_bytes_, layout::DataSplit::kAlignment);
}

uint64_t InternodeWorld::ended(int rank, int node) const {
    const simt::hb::Quiet quiet;
    const auto* window = static_cast<const uint8_t*>(network_->engine(rank).window().host);
    return *reinterpret_cast<const uint64_t*>(window + rail_control_.ended.at(static_cast<uint64_t>(node)));
}

// -- Parameters -----------------------------------------------------------------------------------------------------------

kernels::HeapParams InternodeWorld::heap_params(int rank) const {
    const layout::Topology place = topology(rank);
    kernels::HeapParams params{.bases = {},
                               .rank = place.index(),
                               .num_ranks = options_.ranks_per_node,
                               .control = control_,
                               .first_rank = place.neighbour(0),
                               .num_nodes = options_.num_nodes};
    for (int i = 0; i < options_.ranks_per_node; ++i)
        params.bases[i] = ranks_[static_cast<size_t>(place.neighbour(i))].heap;
    return params;
}

kernels::WatchParams InternodeWorld::watch_params(int rank) const {
    const Rank& here = ranks_[static_cast<size_t>(rank)];
    return {here.local.get(), here.status.device(), to_ns(options_.timeout_s), layout::kLateNs};
}

std::vector<layout::WaitCell> InternodeWorld::wait_cells(int rank) const {
    const Rank& here = ranks_[static_cast<size_t>(rank)];
    std::vector<layout::WaitCell> cells(static_cast<size_t>(layout::num_wait_cells(num_ranks())));
    here.device->copy_now(cells.data(), here.wait_cells.get(), cells.size() * sizeof(layout::WaitCell));
    return cells;
}

layout::RailWindow InternodeWorld::rail_window(const layout::SlotLayout& slot) const {
    return layout::RailWindow::make(num_rail_bytes_, static_cast<uint64_t>(options_.num_nodes), slot.bytes,
                                    options_.chunk_tokens * slot.bytes);
}

kernels::RailPlan InternodeWorld::rail_plan(int rank, const layout::SlotLayout& slot) const {
    const layout::RailWindow window = rail_window(slot);
    EP_CHECK(window.num_chunks > 0, "the test's rail window is too small");
    return {.params = network_->engine(rank).params(),
            .topology = topology(rank),
            .control = rail_control_,
            .window = window,
            .slot = slot,
            .counters = ranks_[static_cast<size_t>(rank)].counters.get(),
            .num_forward_warps = options_.num_warps};
}

layout::WindowLayout InternodeWorld::window(const layout::SlotLayout& slot) const {
    const auto window = layout::WindowLayout::make(num_data_bytes_, static_cast<uint64_t>(options_.ranks_per_node),
                                                   slot.bytes, static_cast<uint64_t>(options_.num_nodes));
    EP_CHECK(options_.ranks_per_node == 1 || window.window > 0, "the test's data region is too small");
    return window;
}

kernels::Geometry InternodeWorld::geometry() const {
    return {.num_blocks = options_.num_blocks,
            .num_send_warps = options_.num_warps,
            .num_recv_warps = options_.num_warps,
            .send = {},
            .recv = {}};
}

layout::SlotLayout InternodeWorld::dispatch_slot(const InternodeCall& call, bool is_cached) const {
    const Problem& problem = call.problem;
    const bool has_topk = call.has_topk && !is_cached;
    return layout::SlotLayout::for_dispatch(
        static_cast<uint64_t>(problem.hidden) * 2, has_topk ? static_cast<uint64_t>(problem.num_topk) : 0,
        static_cast<uint64_t>(problem.num_scales), is_cached ? 0 : static_cast<uint64_t>(options_.ranks_per_node));
}

layout::SlotLayout InternodeWorld::combine_slot(const InternodeCall& call) const {
    return layout::SlotLayout::for_combine(static_cast<uint64_t>(call.problem.hidden) * 2,
                                           static_cast<uint64_t>(call.problem.num_topk));
}

// -- Launches -------------------------------------------------------------------------------------------------------------

void InternodeWorld::launch_notify(InternodeCall& call, int rank) {
    Rank& here = ranks_[static_cast<size_t>(rank)];
    const Problem& problem = call.problem;
    RankTensors& tensors = call.ranks[static_cast<size_t>(rank)];
    RailTensors& rail = call.rails[static_cast<size_t>(rank)];
    const bool asks_host = problem.num_extra_rows == 0;
    kernels::InternodeNotifyParams params{};
    static_cast<kernels::NotifyDispatchPlan&>(params) = {.heap = heap_params(rank),
                                                         .watch = watch_params(rank),
                                                         .num_local_experts = problem.num_experts / num_ranks(),
                                                         .counts = asks_host ? here.counts.device() : nullptr,
                                                         .ticket = num_calls_ + 1,
                                                         .num_threads = 64};
    static_cast<kernels::NotifyArgs&>(params) = notify_args(problem, tensors, rank);
    if (!asks_host) params.expert_alignment = 0;
    if (!call.has_topk) params.num_topk = 0;
    static_cast<kernels::InternodeNotifyFields&>(params) = {.num_tokens_per_node = rail.num_tokens_per_node.data(),
                                                            .recv_rank_prefix = rail.recv_rank_prefix.data(),
                                                            .rail_prefix = rail.rail_prefix.data()};
    params.rail = rail_plan(rank, dispatch_slot(call, false));
    kernels::launch(params, here.stream);
}

void InternodeWorld::launch_dispatch(InternodeCall& call, int rank, Counts counts) {
    Rank& here = ranks_[static_cast<size_t>(rank)];
    const Problem& problem = call.problem;
    RankTensors& tensors = call.ranks[static_cast<size_t>(rank)];
    RailTensors& rail = call.rails[static_cast<size_t>(rank)];
    const bool is_cached = counts == Counts::kKnown;
    kernels::InternodeDispatchParams params{};
    static_cast<kernels::DispatchArgs&>(params) = dispatch_args(problem, tensors, rank, is_cached);
    if (!call.has_topk) params.num_topk = 0;
    const auto slot = layout::SlotLayout::for_dispatch(params.row_bytes, static_cast<uint64_t>(params.num_topk),
                                                       static_cast<uint64_t>(problem.num_scales));
    layout::Loan loan;
    const bool is_lent = problem.lends(rank);
    const auto lent = [&](auto& data, uint64_t& offset) {
        offset = lend(call, rank, data);
        return reinterpret_cast<decltype(data.data())>(here.heap + offset);
    };
    if (is_lent) {
        params.recv_x = reinterpret_cast<uint8_t*>(lent(tensors.recv_x, loan.x));
        params.recv_scales = lent(tensors.recv_scales, loan.scales);
        params.recv_topk_idx = lent(tensors.recv_topk_idx, loan.topk_idx);
        params.recv_topk_weights = lent(tensors.recv_topk_weights, loan.topk_weights);
        params.recv_src_idx = lent(tensors.recv_src_idx, loan.src_idx);
    }
    loan.num_rows = static_cast<uint64_t>(params.num_recv_rows);
    static_cast<kernels::DispatchPlan&>(params) = {.heap = heap_params(rank),
                                                   .watch = watch_params(rank),
                                                   .geometry = geometry(),
                                                   .slot = slot,
                                                   .window = window(slot),
                                                   .is_first_kernel = is_cached,
                                                   .may_lend = options_.lend_bytes > 0,
                                                   .loan = is_lent ? loan : layout::Loan{},
                                                   .num_local_experts = problem.num_experts / num_ranks(),
                                                   .counts = nullptr,
                                                   .ticket = 0};
    static_cast<kernels::InternodeDispatchFields&>(params) = {
        .rail_prefix = rail.rail_prefix.data(),
        .send_rail_head = rail.send_rail_head.data(),
        .rail_head = rail.rail_head.data(),
        .num_rail_rows = static_cast<int>(rail.rail_head.size()) / options_.ranks_per_node};
    params.rail = rail_plan(rank, dispatch_slot(call, is_cached));
    kernels::launch(params, here.stream);
}

void InternodeWorld::launch_combine(InternodeCall& call, int rank) {
    Rank& here = ranks_[static_cast<size_t>(rank)];
    const Problem& problem = call.problem;
    RankTensors& tensors = call.ranks[static_cast<size_t>(rank)];
    RailTensors& rail = call.rails[static_cast<size_t>(rank)];
    const auto slot = layout::SlotLayout::for_combine(static_cast<uint64_t>(problem.hidden) * 2,
                                                      static_cast<uint64_t>(problem.num_topk));
    layout::Loan loan;
    kernels::InternodeCombineParams params{};
    static_cast<kernels::CombineArgs&>(params) = combine_args(problem, tensors, rank);
    if (problem.lends(rank) && !tensors.y.empty()) {
        loan.x = lend(call, rank, tensors.y);
        loan.num_rows = static_cast<uint64_t>(tensors.num_recv_tokens);
        if (problem.num_topk > 0) loan.topk_weights = lend(call, rank, tensors.y_weights);
        params.x = here.heap + loan.x;
    }
    static_cast<kernels::CombinePlan&>(params) = {
        .heap = heap_params(rank),
        .watch = watch_params(rank),
        .geometry = geometry(),
        .slot = slot,
        .window = window(slot),
        .may_lend = options_.lend_bytes > 0,
        .loan = loan,
        .lent_weights = loan.topk_weights == 0 ? nullptr : reinterpret_cast<float*>(here.heap + loan.topk_weights),
        .row_bytes = 2 * static_cast<uint32_t>(problem.hidden)};
    static_cast<kernels::InternodeCombineFields&>(params) = {.rail_prefix = rail.rail_prefix.data(),
                                                             .send_rail_head = rail.send_rail_head.data(),
                                                             .rail_head = rail.rail_head.data(),
                                                             .num_rail_tokens = static_cast<int>(rail.num_rail_tokens)};
    params.rail = rail_plan(rank, combine_slot(call));
    kernels::launch(params, here.stream);
}

void InternodeWorld::run(const std::function<void()>& body) {
    network_->run(*scheduler_, [&] {
        body();
        // All must have ended, also those that wait for one that has failed.
        std::exception_ptr first;
        for (Rank& rank : ranks_) try {
                rank.device->synchronize_stream(rank.stream);
            } catch (const Error&) {
                if (first == nullptr) first = std::current_exception();
            }
        if (first != nullptr) std::rethrow_exception(first);
    });
}

// -- Whole calls ----------------------------------------------------------------------------------------------------------

template <class T> uint64_t InternodeWorld::lend(InternodeCall& call, int rank, std::vector<T>& data) {
    static_cast<void>(call);
    const size_t num_bytes = data.size() * sizeof(T);
    if (num_bytes == 0) return 0;
    Rank& here = ranks_[static_cast<size_t>(rank)];
    const uint64_t offset = lend_offset() + here.lent_bytes;
    here.lent_bytes += layout::align_up(num_bytes, layout::kHeapAlignment);
    EP_CHECK(here.lent_bytes <= options_.lend_bytes, "the test lends more than its world has room for");
    std::memcpy(here.heap + offset, data.data(), num_bytes);
    lent_.push_back({rank, data.data(), here.heap + offset, num_bytes});
    return offset;
}

void InternodeWorld::collect(InternodeCall&) {
    for (const Lent& lent : lent_) std::memcpy(lent.data, lent.memory, lent.num_bytes);
    lent_.clear();
    for (Rank& rank : ranks_) rank.lent_bytes = 0;
}

void InternodeWorld::prepare_dispatch(InternodeCall& call, int rank, bool asks_host) {
    const auto idx = static_cast<size_t>(rank);
    const Problem& problem = call.problem;
    RankTensors& tensors = call.ranks[idx];
    RailTensors& rail = call.rails[idx];
    const int num_local_experts = problem.num_experts / num_ranks();
    const layout::Topology place = topology(rank);
    int64_t num_rows = 0, num_rail_tokens = 0;
    std::vector<int> of_experts(static_cast<size_t>(num_local_experts), 0);
    for (int source = 0; source < num_ranks(); ++source) {
        const RankTensors& from = call.ranks[static_cast<size_t>(source)];
        num_rows += from.num_tokens_per_rank[idx];
        for (int e = 0; e < num_local_experts; ++e)
            of_experts[static_cast<size_t>(e)] +=
                from.num_tokens_per_expert[static_cast<size_t>(rank * num_local_experts + e)];
        if (place.index_of(source) == place.index() && !place.is_neighbour(source))
            num_rail_tokens +=
                call.rails[static_cast<size_t>(source)].num_tokens_per_node[static_cast<size_t>(place.node())];
    }
    for (int& count : of_experts)
        count = (count + problem.expert_alignment - 1) / problem.expert_alignment * problem.expert_alignment;
    if (asks_host) {
        const layout::HostCounts& counts = *ranks_[idx].counts.host();
        EP_CHECK(counts.ready == num_calls_ + 1, "rank ", rank, ": the host has not been told");
        EP_CHECK(counts.num_rail_tokens == num_rail_tokens, "rank ", rank, ": the host was told of ",
                 counts.num_rail_tokens, " tokens on the rail, not ", num_rail_tokens);
        num_rows = counts.num_recv_tokens;
        of_experts.assign(counts.num_recv_per_expert, counts.num_recv_per_expert + num_local_experts);
    }
    tensors.num_recv_tokens = num_rows;
    tensors.num_recv_per_expert = of_experts;
    rail.num_rail_tokens = num_rail_tokens;
    rail.rail_head.assign(
        static_cast<size_t>(num_rail_tokens + problem.num_extra_rows) * static_cast<size_t>(options_.ranks_per_node),
        -7);
    prepare_recv(problem, tensors, num_rows + problem.num_extra_rows);
}

std::string InternodeWorld::dispatch(InternodeCall& call) {
    const bool asks_host = call.problem.num_extra_rows == 0;
    if (!asks_host)
        for (int rank = 0; rank < num_ranks(); ++rank) prepare_dispatch(call, rank, false);
    run([&] {
        for (int rank = 0; rank < num_ranks(); ++rank) launch_notify(call, rank);
        if (!asks_host)
            for (int rank = 0; rank < num_ranks(); ++rank) launch_dispatch(call, rank, Counts::kExchanged);
    });
    if (asks_host) {
        for (int rank = 0; rank < num_ranks(); ++rank) prepare_dispatch(call, rank, true);
        run([&] {
            for (int rank = 0; rank < num_ranks(); ++rank) launch_dispatch(call, rank, Counts::kExchanged);
        });
    }
    ++num_calls_;
    collect(call);
    return check_dispatch(call.problem, call.ranks, !call.has_topk);
}

std::string InternodeWorld::dispatch_cached(InternodeCall& call) {
    for (RankTensors& tensors : call.ranks) prepare_recv(call.problem, tensors, tensors.num_recv_tokens);
    run([&] {
        for (int rank = 0; rank < num_ranks(); ++rank) launch_dispatch(call, rank, Counts::kKnown);
    });
    ++num_calls_;
    collect(call);
    return check_dispatch(call.problem, call.ranks, true);
}

std::string InternodeWorld::combine(InternodeCall& call) {
    for (int rank = 0; rank < num_ranks(); ++rank)
        prepare_combine(call.problem, call.ranks[static_cast<size_t>(rank)], rank);
    run([&] {
        for (int rank = 0; rank < num_ranks(); ++rank) launch_combine(call, rank);
    });
    ++num_calls_;
    lent_.clear();
    for (Rank& rank : ranks_) rank.lent_bytes = 0;
    return check_combine(call.problem, call.ranks);
}

std::string InternodeWorld::round_trip(const Problem& problem) {
    InternodeCall call(problem, options_);
    if (std::string difference = dispatch(call); !difference.empty()) return "dispatch: " + difference;
    if (std::string difference = combine(call); !difference.empty()) return "combine: " + difference;
    if (std::string difference = dispatch_cached(call); !difference.empty()) return "cached: " + difference;
    if (std::string difference = combine(call); !difference.empty()) return "combine after cached: " + difference;
    return "";
}

}  // namespace deep_ep::test
