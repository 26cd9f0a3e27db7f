// What the exchange of a group does elsewhere, between processes of a test: files in a folder that all of them see.
#pragma once

#include <string>
#include <vector>

namespace deep_ep::testing {

class Meeting {
public:
    Meeting(int rank, int num_ranks, const std::string& folder) : rank_(rank), num_ranks_(num_ranks), folder_(folder) {}

    int rank() const { return rank_; }
    int num_ranks() const { return num_ranks_; }
    // Everybody's bytes, by rank, once all have come. Throws Error after a while.
    std::vector<std::string> gather(const std::string& own);

private:
    std::string name_of(int rank) const;

    const int rank_, num_ranks_;
    const std::string folder_;
    int num_held_ = 0;
};

}  // namespace deep_ep::testing
