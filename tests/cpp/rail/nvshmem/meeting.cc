#include "rail/nvshmem/meeting.h"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "core/error.h"

namespace deep_ep::testing {

std::string Meeting::name_of(int rank) const { return concat(folder_, "/", num_held_, ".", rank); }

std::vector<std::string> Meeting::gather(const std::string& own) {
    constexpr int kPatienceMs = 60'000;
    const std::string name = name_of(rank_);
    std::ofstream(name + ".new", std::ios::binary) << own;
    std::filesystem::rename(name + ".new", name);
    std::vector<std::string> found;
    for (int rank = 0; rank < num_ranks_; ++rank) {
        for (int waited = 0; !std::filesystem::exists(name_of(rank)); ++waited) {
            if (waited > kPatienceMs) throw Error(concat("rank ", rank, " does not come to meeting ", num_held_));
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        std::ifstream file(name_of(rank), std::ios::binary);
        found.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    ++num_held_;
    return found;
}

}  // namespace deep_ep::testing
