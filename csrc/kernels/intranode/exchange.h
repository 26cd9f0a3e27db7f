// Which rows go where, as ranks tell each other and as kernels then know it; and what is refused of it.
//
// The count exchange: every rank tells every peer how many tokens it sends to each rank, and how many entries to each of the
// peer's experts. Each count is one word that says which call it belongs to, so a count is there as soon as it can be seen.
#pragma once

#include "device/algo/watch.h"
#include "device/prim.h"
#include "layout/heap.h"

namespace deep_ep::kernels {
inline namespace EP_BACKEND {

// After wait_for_banks: to every peer, how many tokens `source` sends to `destination`.
EP_DEVICE void write_rank_count(const algo::Watch& watch, int source, int destination, int count) {
    const algo::Heap& heap = watch.heap;
    const int bank = algo::bank_of(watch.call);
    for (int peer = 0; peer < heap.num_ranks(); ++peer)
        prim::store<prim::Order::kRelaxed, prim::Scope::kSys>(heap.rank_count(peer, bank, source, destination),
                                                              layout::make_count(watch.call, count));
}

// To the peer that owns it, the entries that `source` has for expert `expert` of those of this node.
EP_DEVICE void write_expert_count(const algo::Watch& watch, int source, int num_local_experts, int expert, int count) {
    prim::store<prim::Order::kRelaxed, prim::Scope::kSys>(
        watch.heap.expert_count(expert / num_local_experts, algo::bank_of(watch.call), source,
                                expert % num_local_experts),
        layout::make_count(watch.call, count));
}

// To every peer the entries for its experts.
template <class Group>
EP_DEVICE void write_expert_counts(const Group& group, const algo::Watch& watch, const int* num_tokens_per_expert,
                                   int num_local_experts) {
    algo::for_each(group, num_local_experts * watch.heap.num_ranks(), [&](int i) {
        write_expert_count(watch, watch.heap.rank(), num_local_experts, i, num_tokens_per_expert[i]);
    });
}

// A call, not inlined: it is only for counts that were not there at the first look.
// Counts of a rank of another node come from a neighbour: it is the one to name as long as it has not entered the call.
EP_DEVICE_COLD bool wait_for_count(algo::Watch watch, algo::WaitSite site, const uint64_t* word) {
    const algo::Heap& heap = watch.heap;
    if (const int forwarder = site.peer % heap.num_ranks();
        layout::is_rail_stage(site.stage) && !algo::wait_at_least(watch, {layout::Stage::kLoan, forwarder},
                                                                  heap.started(heap.rank(), forwarder), watch.call))
        return false;
    return algo::wait_until(watch, site, layout::make_count(watch.call, 0), [&](uint64_t& seen) {
        seen = prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(word);
        return layout::is_count_of(seen, watch.call);
    });
}

// Whose counts those of `source` come from, where there are several nodes: a neighbour's own, or a rank's of another node.
EP_DEVICE algo::WaitSite count_site(const algo::Watch& watch, int source) {
    const int neighbour = source - watch.heap.first_rank();
    if (neighbour >= 0 && neighbour < watch.heap.num_ranks()) return {layout::Stage::kCounts, neighbour};
    return {layout::Stage::kRailCounts, source};
}

// Adds up what the sources have counted, in their order; `word_at(heap, bank, source)` is where. `store(source, sum)` gets
// the sum up to each. False: a wait failed.
template <class WordAt, class Store>
EP_DEVICE bool accumulate_sources(const algo::Watch& watch, const WordAt& word_at, const Store& store) {
    const int bank = algo::bank_of(watch.call);
    const auto word_of = [&](int source) { return word_at(watch.heap, bank, source); };
    constexpr int kBatch = 4;  // under way at once
    const int num_sources = watch.heap.num_sources();
    int sum = 0;
    for (int first = 0; first < num_sources; first += kBatch) {
        int counts[kBatch] = {};
        auto look = [&] {
            bool are_here = true;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (first + i >= num_sources) continue;
                const uint64_t word = prim::load<prim::Order::kRelaxed, prim::Scope::kSys>(word_of(first + i));
                counts[i] = layout::count_in(word);
                are_here &= layout::is_count_of(word, watch.call);
            }
            return are_here;
        };
        if (!look()) {
#pragma unroll 1
            for (int source = first; source < first + kBatch && source < num_sources; ++source)
                if (!wait_for_count(watch, count_site(watch, source), word_of(source))) return false;
            look();
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i >= num_sources) break;
            sum += counts[i];
            store(first + i, sum);
        }
    }
    return true;
}

// Tokens that the sources send to `destination`.
template <class Store>
EP_DEVICE bool accumulate_rank_counts(const algo::Watch& watch, int destination, const Store& store) {
    const auto word_at = [&](const algo::Heap& heap, int bank, int source) {
        return heap.rank_count(heap.rank(), bank, source, destination);
    };
    return accumulate_sources(watch, word_at, store);
}

// Entries that the sources have for one of our experts.
template <class Store>
EP_DEVICE bool accumulate_expert_counts(const algo::Watch& watch, int local_expert, const Store& store) {
    const auto word_at = [&](const algo::Heap& heap, int bank, int source) {
        return heap.expert_count(heap.rank(), bank, source, local_expert);
    };
    return accumulate_sources(watch, word_at, store);
}

// To the host, the entries for our experts. Each thread has an answer of its own.
template <class Group>
EP_DEVICE bool tell_expert_counts(const Group& group, const algo::Watch& watch, layout::HostCounts* counts,
                                  int num_local_experts, int expert_alignment) {
    bool is_ok = true;
    algo::for_each(group, num_local_experts, [&](int e) {
        int total = 0;
        is_ok &= accumulate_expert_counts(watch, e, [&](int, int sum) { total = sum; });
        const int aligned = (total + expert_alignment - 1) / expert_alignment * expert_alignment;
        prim::store<prim::Order::kRelaxed, prim::Scope::kSys>(&counts->num_recv_per_expert[e], aligned);
    });
    return is_ok;
}

// Last, after a barrier of those that have told the host the rest.
EP_DEVICE void tell_num_rows(layout::HostCounts* counts, int64_t num_rows, uint64_t ticket) {
    using prim::Order;
    using prim::Scope;
    prim::store<Order::kRelaxed, Scope::kSys>(&counts->num_recv_tokens, num_rows);
    // Pairs with: CountExchange::wait on the host.
    prim::store<Order::kRelease, Scope::kSys>(&counts->ready, ticket);
}

// -- Where rows stand ------------------------------------------------------------------------------------------------

// Rows of one rank at another, and all rows there.
struct RowSpan {
    int first, end, total;

    EP_DEVICE bool can_be() const { return first >= 0 && end >= first && end <= total; }
};

// rank_prefix_matrix[src][dst]: rows that the sources 0..src send to dst. Sources are ranks of all nodes, destinations those
// of this node.
struct RowMap {
    const int* prefix;
    int num_ranks;  // destinations
    int num_sources = num_ranks;

    EP_DEVICE int first_row(int source, int destination) const {
        return source == 0 ? 0 : prefix[(source - 1) * num_ranks + destination];
    }
    EP_DEVICE int num_rows(int source, int destination) const {
        return prefix[source * num_ranks + destination] - first_row(source, destination);
    }
    EP_DEVICE int total_rows(int destination) const { return prefix[(num_sources - 1) * num_ranks + destination]; }
    EP_DEVICE RowSpan span(int source, int destination) const {
        return {first_row(source, destination), prefix[source * num_ranks + destination], total_rows(destination)};
    }
};

// What one rank needs of that matrix, in shared memory: it is known before the matrix is.
class RowTable {
public:
    EP_DEVICE int first_row_at(int destination) const { return first_at_[destination]; }
    EP_DEVICE int num_rows_at(int destination) const { return num_at_[destination]; }
    EP_DEVICE int first_row_from(int source) const { return source == 0 ? 0 : end_from_[source - 1]; }
    EP_DEVICE int num_rows_from(int source) const { return end_from_[source] - first_row_from(source); }

    EP_DEVICE int num_rows(int num_ranks) const { return end_from_[num_ranks - 1]; }

    // Takes in prefix[source][destination]. Every source of a destination, in order, by one thread.
    EP_DEVICE void take(int self, int source, int destination, int sum) {
        if (source == 0 && self == 0) first_at_[destination] = 0;
        if (source + 1 == self) first_at_[destination] = sum;
        if (source == self) num_at_[destination] = sum - first_at_[destination];
        if (destination == self) end_from_[source] = sum;
    }

private:
    int first_at_[layout::kMaxRanks];  // of this rank's rows at each destination
    int num_at_[layout::kMaxRanks];    // of them
    int end_from_[layout::kMaxRanks];  // of each source's rows here: one beyond the last
};

// -- Bad input that only a kernel can see: what the handle or the peers say cannot be. Each ends the call with a report

EP_DEVICE_COLD bool refuse_room(algo::Watch watch, int num_rows_held, int num_rows) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kCapacity, 0},
               static_cast<uint64_t>(num_rows_held), static_cast<uint64_t>(num_rows), 0);
    return false;
}

// False: `num_rows` belong to this rank, and its tensors hold fewer.
EP_DEVICE bool has_room(const algo::Watch& watch, int num_rows_held, int num_rows) {
    return num_rows <= num_rows_held || refuse_room(watch, num_rows_held, num_rows);
}

// False: token `token` is the one at `position` (from 0) of those that go to `rank`, and fewer are stated: whoever wrote or
// read its row would do so beyond what is there.
EP_DEVICE_COLD bool refuse_position(algo::Watch watch, int rank, int token, int position, int num_stated) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kPosition, rank, token},
               static_cast<uint64_t>(num_stated), static_cast<uint64_t>(position) + 1, 0);
    return false;
}

// False: the rows from `source` to `destination`, of `num_rows` in all, cannot be there.
EP_DEVICE_COLD bool refuse_rows(algo::Watch watch, int source, int destination, int first, int end, int num_rows) {
    algo::fail(watch, layout::FailureKind::kBadInput, {layout::Stage::kRows, source, destination},
               static_cast<uint64_t>(num_rows), layout::make_row_span(first, end), 0);
    return false;
}

}  // namespace EP_BACKEND
}  // namespace deep_ep::kernels
