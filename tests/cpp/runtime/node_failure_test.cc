// What ranks of several nodes tell each other of failures while no kernel runs: through neighbours' heaps and mailboxes, and
// one word over the rail. The engine here delivers at once.
#include <doctest/doctest.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "device/simt/device.h"
#include "device/simt/scheduler.h"
#include "runtime/connection.h"

namespace deep_ep::runtime {
namespace {

class PromptEngine;
struct Rail {
    std::mutex guard{};                      // of the maps: ranks may leave on threads of their own
    std::map<int, PromptEngine*> engines{};  // by rank
    std::map<int, double> released_s{};      // likewise
    bool shares_windows = false;
    std::function<void()> on_release = [] {};
};

class PromptEngine final : public rail::Engine {
public:
    PromptEngine(Rail& rail, const rail::EngineOptions& options)
        : rail_(rail), rank_(options.rank), words_(options.window_bytes / sizeof(uint64_t)) {
        const std::lock_guard lock(rail_.guard);
        rail_.engines[rank_] = this;
    }
    ~PromptEngine() override {
        const std::lock_guard lock(rail_.guard);
        rail_.engines.erase(rank_);
    }

    std::string failure, loss;  // loss: of the connection to rank 2
    std::vector<int> peers;
    bool is_cut = false;  // what it sends is lost

    std::string name() const override { return "prompt"; }
    std::string address() const override { return concat("rank ", rank_); }
    void connect(const std::vector<std::string>& addresses, const std::vector<int>& of) override {
        for (int peer : of) CHECK_EQ(addresses.at(static_cast<size_t>(peer)), concat("rank ", peer));
        peers = of;
    }
    rail::Window window() const override {
        void* memory = const_cast<uint64_t*>(words_.data());
        return {memory, memory, words_.size() * sizeof(uint64_t)};
    }
    rail::Params params() const override { return {}; }
    size_t chunk_bytes() const override { return 1 << 18; }
    void set(int peer, uint64_t flag, uint64_t value) override {
        const std::lock_guard lock(rail_.guard);
        const auto found = rail_.engines.find(peer);
        if (is_cut || found == rail_.engines.end()) return;
        uint64_t& word = found->second->words_.at(flag / sizeof(uint64_t));
        CHECK_EQ(word, 0);  // nobody writes it twice
        word = value;
    }
    void check() const override {
        check_itself();
        if (!loss.empty()) throw TransportError(loss);
    }
    void check_itself() const override {
        if (!failure.empty()) throw TransportError(failure);
    }
    std::string loss_of(int peer) const override { return peer == 2 ? loss : ""; }
    bool has_left(int peer) const override {
        const std::lock_guard lock(rail_.guard);
        return rail_.released_s.count(peer) > 0;
    }
    std::vector<const uint8_t*> share_windows(const std::vector<int>& neighbours) override {
        return std::vector<const uint8_t*>(rail_.shares_windows ? neighbours.size() : 0);
    }
    rail::Traffic sent_to(int) const override { return {}; }
    void release(double timeout_s) override {
        {
            const std::lock_guard lock(rail_.guard);
            rail_.released_s[rank_] = timeout_s;
        }
        rail_.on_release();
    }

    uint64_t& word(uint64_t offset) { return words_.at(offset / sizeof(uint64_t)); }

private:
    Rail& rail_;
    const int rank_;
    std::vector<uint64_t> words_;
};

struct Nodes : Rail {
    int num_nodes, ranks_per_node;
    int64_t num_low_latency_bytes;
    bool is_shrinkable;
    simt::Scheduler scheduler{};
    std::vector<std::unique_ptr<Connection>> connections{};

    Nodes(int nodes, int of_ranks, int64_t low_latency_bytes = 0, bool shrinks = false)
        : num_nodes(nodes), ranks_per_node(of_ranks), num_low_latency_bytes(low_latency_bytes), is_shrinkable(shrinks) {
        shares_windows = low_latency_bytes > 0;
        for (int rank = 0; rank < num_ranks(); ++rank)
            connections.push_back(
                std::make_unique<Connection>(std::make_shared<simt::SimtDevice>(scheduler, rank), options_of(rank)));
        std::vector<std::string> handles, addresses;
        for (const auto& connection : connections) {
            handles.push_back(connection->export_handle());
            addresses.push_back(connection->rail_address());
        }
        for (const auto& connection : connections) connection->connect(handles);
        for (const auto& connection : connections) connection->connect_rail(addresses);
    }
    int num_ranks() const { return num_nodes * ranks_per_node; }
    Connection& operator[](int rank) { return *connections[static_cast<size_t>(rank)]; }
    BufferOptions options_of(int rank) {
        return {.rank = rank,
                .num_ranks = num_ranks(),
                .num_data_bytes = 1 << 12,
                .num_low_latency_bytes = num_low_latency_bytes,
                .timeout_s = 1,
                .warn_s = 1,
                .is_shrinkable = is_shrinkable,
                .ranks_per_node = ranks_per_node,
                .num_rail_bytes = 1 << 12,
                .make_engine = [this](const auto&, const rail::EngineOptions& options) {
                    return std::make_unique<PromptEngine>(*this, options);
                }};
    }
    // Each rank's watcher looks once, in the order in which news travels worst.
    void look_around(int origin) {
        for (int step = num_ranks(); step > 0; --step) (*this)[(origin + step) % num_ranks()].look();
    }
    int num_failed() {
        int count = 0;
        for (const auto& connection : connections) count += connection->failure().empty() ? 0 : 1;
        return count;
    }
};

struct Shape {
    int num_nodes, ranks_per_node;
};
constexpr Shape kShapes[] = {{2, 1}, {2, 2}, {3, 2}, {2, 4}, {4, 2}, {8, 1}};

TEST_CASE("a failure reaches every rank in three hops, over idle hosts alone") {
    for (const Shape& shape : kShapes)
        for (int origin = 0; origin < shape.num_nodes * shape.ranks_per_node; ++origin) {
            CAPTURE(shape.num_nodes);
            CAPTURE(shape.ranks_per_node);
            CAPTURE(origin);
            Nodes nodes(shape.num_nodes, shape.ranks_per_node);
            nodes[origin].fail(FailureClass::kOther, "a reason", Spread::kPeers);
            for (int hop = 0; hop < 3; ++hop) nodes.look_around(origin);
            CHECK_EQ(nodes.num_failed(), nodes.num_ranks());
        }
}

TEST_CASE("where the rail of the rank that fails is cut, its neighbours pass the news on over theirs") {
    for (const Shape& shape : kShapes)
        for (int origin = 0; shape.ranks_per_node > 1 && origin < shape.num_nodes * shape.ranks_per_node; ++origin) {
            Nodes nodes(shape.num_nodes, shape.ranks_per_node);
            nodes.engines.at(origin)->is_cut = true;
            nodes[origin].fail(FailureClass::kOther, "a reason", Spread::kPeers);
            for (int hop = 0; hop < 3; ++hop) nodes.look_around(origin);
            CHECK_EQ(nodes.num_failed(), nodes.num_ranks());
        }
}

TEST_CASE("a rank that leaves peers out of its failure tells nobody") {
    Nodes nodes(2, 2);
    nodes[0].fail(FailureClass::kOther, "a reason", Spread::kNobody);
    for (int hop = 0; hop < 3; ++hop) nodes.look_around(0);
    CHECK_EQ(nodes.num_failed(), 1);
}

TEST_CASE("every rank of every node quotes the reason") {
    Nodes nodes(2, 2);
    nodes[1].fail(FailureClass::kOther, "the reason of rank 1", Spread::kPeers);
    for (int hop = 0; hop < 3; ++hop) nodes.look_around(1);
    CHECK_EQ(nodes[0].failure(),
             "DeepEP error: rank 0 of node 0: aborted, because rank 1 of node 0 failed: the reason of rank 1");
    CHECK_EQ(nodes[3].failure(),
             "DeepEP error: rank 3 of node 1: aborted, rank 1 of node 0 reported an error of its own: the reason of "
             "rank 1.");
    // It has heard of it from its neighbour, or over its own rail from rank 0.
    CHECK(nodes[2].failure().find("the reason of rank 1") != std::string::npos);
}

TEST_CASE("a reason of any length crosses the rail, cut where its words end") {
    constexpr size_t kMost = 8 * (layout::kRailReasonWords - 1);
    for (const size_t length : {size_t{1}, size_t{8}, size_t{9}, kMost, kMost + 1, size_t{900}}) {
        CAPTURE(length);
        Nodes nodes(2, 1);
        std::string reason(length, 'a');
        reason.back() = 'z';
        nodes[0].fail(FailureClass::kOther, reason, Spread::kPeers);
        nodes[1].look();
        const std::string quoted = "error of its own: " + reason.substr(0, kMost);
        CHECK(nodes[1].failure().ends_with(quoted + "."));
    }
}

TEST_CASE("a reason of which a word is still under way is not quoted in part") {
    Nodes nodes(2, 1);
    const layout::RailControl& control = nodes[1].rail_region().control;
    nodes.engines[1]->word(control.abort.at(0)) = layout::make_abort_code(0, 0);
    nodes.engines[1]->word(control.reason.at(0)) = 12;
    nodes.engines[1]->word(control.reason.at(1)) = 0x6161616161616161;
    nodes[1].look();
    CHECK(nodes[1].failure().ends_with("rank 0 of node 0 reported an error of its own."));
}

TEST_CASE("a broken connection is an error of the transport at once, and passed on") {
    Nodes nodes(2, 2);
    nodes.engines[0]->loss = "rail: the connection to rank 2 at 10.0.0.2:4455: Connection reset by peer (errno 104)";
    nodes[0].look();
    CHECK_THROWS_WITH_AS(nodes[0].check(),
                         "DeepEP error: rank 0 of node 0: rail: the connection to rank 2 at 10.0.0.2:4455: Connection "
                         "reset by peer (errno 104)",
                         TransportError);
    for (int hop = 0; hop < 2; ++hop) nodes.look_around(0);
    CHECK_EQ(nodes.num_failed(), 4);
    CHECK(nodes[1].failure().find("10.0.0.2:4455") != std::string::npos);
    CHECK_THROWS_AS(nodes[3].check(), TimeoutError);
}

TEST_CASE("where peers may be left out a broken connection is no failure, but what befalls the engine itself is") {
    Nodes nodes(2, 2, 1 << 16, true);
    nodes.engines[0]->loss = "rail: the connection to rank 2 is broken";
    CHECK_EQ(nodes[0].look(), "");
    CHECK_NOTHROW(nodes[0].check());
    nodes.engines[0]->failure = "rail: its thread 'deep_ep rail in' has ended: no memory";
    nodes[0].look();
    CHECK_THROWS_WITH_AS(nodes[0].check(),
                         "DeepEP error: rank 0 of node 0: rail: its thread 'deep_ep rail in' has ended: no memory",
                         TransportError);
}

TEST_CASE("what a kernel at a rail peer gives up for is read by a host whose kernels do not run") {
    Nodes nodes(3, 2);
    const layout::RailControl& control = nodes[2].rail_region().control;
    // Word [0][2]: of the kernels of rank 4, which is in node 2.
    nodes.engines[2]->word(control.abort.at(2)) = layout::make_abort_code(4, 1);
    CHECK_EQ(nodes[2].look(),
             "DeepEP error: rank 2 of node 1: aborted, rank 4 of node 2 gave up waiting for rank 1 of node 0.");
    for (int hop = 0; hop < 2; ++hop) nodes.look_around(2);
    CHECK_EQ(nodes.num_failed(), 6);
}

TEST_CASE("neighbours that have gone are named where the news comes over the rail") {
    Nodes nodes(2, 2);
    nodes[1].destroy(0);
    nodes[2].fail(FailureClass::kOther, "lost its rail peer", Spread::kPeers);
    nodes[0].look();
    CHECK(nodes[0].failure().ends_with("rank 1 of node 0: it has destroyed its Buffer."));
}

TEST_CASE("rail peers are those of the same index, and the engine is released with the time that destroy has") {
    Nodes nodes(3, 2);
    CHECK_EQ(nodes.engines.at(3)->peers, std::vector<int>{1, 5});
    nodes[3].destroy(0.25);
    CHECK_EQ(nodes.engines.count(3), 0);
    CHECK_EQ(nodes.released_s.at(3), 0.25);
    CHECK_EQ(nodes[3].look(), "");
}

TEST_CASE("an engine receives for the neighbours who read its window until they leave too") {
    Nodes nodes(2, 2, 1 << 20);
    CHECK(nodes[0].node_windows() != nullptr);
    bool is_neighbour_going = false;
    // A process that never had a thread counts references without atomics, which ThreadSanitizer takes for a race of the two.
    std::thread([] {}).join();
    nodes.on_release = [&] { CHECK(is_neighbour_going); };
    nodes.scheduler.run_hosts({[&] { nodes[0].destroy(100); },
                               [&] {
                                   CHECK_EQ(nodes.released_s.count(0), 0);
                                   is_neighbour_going = true;
                                   nodes[1].destroy(100);
                               }});
    CHECK_EQ(nodes.released_s.size(), 2);
    nodes.on_release = [] {};
}

TEST_CASE("within a node no engine is made") {
    simt::Scheduler scheduler;
    BufferOptions options{.rank = 0,
                          .num_ranks = 2,
                          .num_data_bytes = 1 << 12,
                          .num_low_latency_bytes = 0,
                          .timeout_s = 1,
                          .warn_s = 1,
                          .is_shrinkable = false};
    options.make_engine = [](const auto&, const auto&) -> std::unique_ptr<rail::Engine> { throw Error("made"); };
    const Connection connection(std::make_shared<simt::SimtDevice>(scheduler, 0), options);
    CHECK_EQ(connection.rail_address(), "");
    options.ranks_per_node = 1;
    CHECK_THROWS_WITH_AS(Connection(std::make_shared<simt::SimtDevice>(scheduler, 0), options), "made", Error);
}

}  // namespace
}  // namespace deep_ep::runtime
