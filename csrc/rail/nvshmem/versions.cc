#include "rail/nvshmem/versions.h"

#include <tuple>

#include "core/error.h"

namespace deep_ep::rail::nvshmem {
namespace {

constexpr Version kNewQueuePairs{3, 5, 19};

auto key(const Version& version) { return std::tuple(version.major, version.minor, version.patch); }

bool has_new_queue_pairs(const Version& version) { return key(version) >= key(kNewQueuePairs); }

}  // namespace

std::string text(const Version& version) { return concat(version.major, ".", version.minor, ".", version.patch); }

bool operator==(const Version& a, const Version& b) { return key(a) == key(b); }

std::string why_unfit(const Version& built, const Version& loaded) {
    const std::string both = concat("built with NVSHMEM ", text(built), ", and NVSHMEM ", text(loaded), " is loaded");
    if (built.major != loaded.major) return both + ": another major version";
    if (loaded.minor < built.minor) return both + ": an older one does not serve newer device code";
    if (has_new_queue_pairs(built) != has_new_queue_pairs(loaded))
        return concat(both, ": ", text(kNewQueuePairs), " changed what device code and library share");
    return "";
}

}  // namespace deep_ep::rail::nvshmem
