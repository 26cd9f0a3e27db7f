// The pieces of device/algo that every kernel uses, alone.
#include <doctest/doctest.h>

#include <vector>

#include "device/algo/formats.h"
#include "device/algo/group.h"
#include "device/launch.h"
#include "device/simt/device.h"

using namespace deep_ep;
using prim::Order;
using prim::Scope;

namespace {

struct Params {
    uint32_t* words;
    uint32_t* counter;
    int num;
};

// Runs K and returns `num_words` words, which are `before` at first; the word behind them is the counter.
template <class K>
std::vector<uint32_t> words_after(dev::LaunchConfig config, size_t num_words, uint32_t before, int num,
                                  uint64_t seed = 0) {
    simt::Scheduler scheduler({.seed = seed});
    simt::SimtDevice device(scheduler, 0);
    const auto stream = device.create_stream();
    std::vector<uint32_t> values(num_words, before);
    values.push_back(0);
    auto* words = static_cast<uint32_t*>(device.allocate(values.size() * 4));
    device.copy_now(words, values.data(), values.size() * 4);
    dev::launch<K>(config, stream, {words, words + num_words, num});
    device.synchronize_stream(stream);
    device.copy_now(values.data(), words, values.size() * 4);
    return values;
}

// Every block writes a word; the last one sums them all.
template <bool kIsBlock> struct LastBlockKernel {
    using Params = ::Params;
    struct Shared {
        int word;
    };
    static EP_DEVICE void run(const Params& p, Shared& shared) {
        if (threadIdx.x == 40) p.words[blockIdx.x] = blockIdx.x + 1;
        bool is_last;
        if constexpr (kIsBlock) {
            is_last = algo::is_last_block<Order::kAcqRel, Scope::kGpu>(algo::Block{}, p.counter, shared.word);
        } else {
            __syncthreads();
            if (prim::warp_idx() != 0) return;
            is_last = algo::is_last_block<Order::kAcqRel, Scope::kGpu>(algo::Warp{}, p.counter);
        }
        if (!is_last || threadIdx.x != 7) return;
        uint32_t sum = 0;
        for (unsigned block = 0; block < gridDim.x; ++block) sum += p.words[block];
        p.words[p.num] += sum;
    }
};

template <bool kIsBlock> void check_last_block() {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        constexpr int kNumBlocks = 9;
        const auto words = words_after<LastBlockKernel<kIsBlock>>({.num_blocks = kNumBlocks, .num_threads = 64},
                                                                  kNumBlocks + 1, 0, kNumBlocks, seed);
        CHECK(words[kNumBlocks] == 45);     // by one block only, which has seen the others' words
        CHECK(words[kNumBlocks + 1] == 0);  // ready for the next launch
    }
}

struct MarkKernel {
    using Params = ::Params;
    struct Shared {};
    static EP_DEVICE void run(const Params& p, Shared&) {
        if (threadIdx.x != 0) return;
        const algo::Arrival arrival =
            algo::arrive<Order::kRelaxed, Scope::kGpu>(p.counter, static_cast<int>(blockIdx.x) == p.num);
        if (arrival.is_last) p.words[0] = arrival.is_marked ? 2 : 1;
    }
};

struct VoidKernel {
    using Params = ::Params;
    struct Shared {};
    static EP_DEVICE void run(const Params& p, Shared&) {
        algo::void_output(algo::Block{}, p.words, p.num * 4);
        algo::void_output(algo::Block{}, nullptr, p.num * 4);
    }
};

// Copies a row of `num` vectors onto itself, each word one more than it was.
template <algo::Pieces kPieces> struct RowKernel {
    using Params = ::Params;
    struct Shared {};
    static EP_DEVICE void run(const Params& p, Shared&) {
        constexpr int kVecs = 3;
        const algo::Warp warp;
        auto* row = reinterpret_cast<prim::Vec16*>(p.words);
        for (int base = 0; base < p.num; base += algo::kChunkVecs<kVecs>) {
            algo::Piece<kVecs> piece = {};
            algo::load_piece(warp, kPieces, piece, p.num - base, [&](int vec) { return row[base + vec]; });
            for (prim::Vec16& vec : piece.vec)
                for (uint32_t& word : vec.word) ++word;
            algo::store_piece(warp, kPieces, piece, p.num - base, row + base);
        }
    }
};

struct SumKernel {
    using Params = ::Params;
    struct Shared {};
    static EP_DEVICE void run(const Params& p, Shared&) {
        if (threadIdx.x != 0) return;
        auto* vecs = reinterpret_cast<prim::Vec16*>(p.words);
        algo::Bf16Sums sums = {};
        sums.add(vecs[0]);
        sums.add(vecs[0], 0.5f);
        vecs[0] = sums.rounded();
    }
};

}  // namespace

TEST_CASE("the last block sees what the others did, and there is one") {
    check_last_block<true>();
    check_last_block<false>();
}

TEST_CASE("the last block knows whether any came with a mark") {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        CHECK(words_after<MarkKernel>({.num_blocks = 5}, 1, 0, 3, seed)[0] == 2);
        CHECK(words_after<MarkKernel>({.num_blocks = 5}, 1, 0, -1, seed)[0] == 1);
    }
}

TEST_CASE("a void output is void to its end, and nothing behind it") {
    const auto words = words_after<VoidKernel>({.num_threads = 64}, 200, 5, 150);
    for (size_t i = 0; i < 200; ++i) CHECK(words[i] == (i < 150 ? algo::kVoidWord : 5));
}

TEST_CASE("pieces cover a row once, short last chunk and all") {
    for (const int num_vecs : {1, 95, 96, 97, 200}) {
        CAPTURE(num_vecs);
        const auto check = [&](const std::vector<uint32_t>& words) {
            for (size_t i = 0; i < 1000; ++i) CHECK(words[i] == (i < static_cast<size_t>(num_vecs) * 4 ? 8 : 7));
        };
        check(words_after<RowKernel<algo::Pieces::kInterleaved>>({}, 1000, 7, num_vecs));
        check(words_after<RowKernel<algo::Pieces::kNeighbours>>({}, 1000, 7, num_vecs));
    }
}

TEST_CASE("sums of bfloat16 are taken in FP32 and rounded once") {
    // 1.0 and 2.0 in each pair: 1.5 times them are 1.5 and 3.0.
    const auto words = words_after<SumKernel>({}, 4, 0x40003f80u, 0);
    for (size_t i = 0; i < 4; ++i) CHECK(words[i] == 0x40403fc0u);
}
