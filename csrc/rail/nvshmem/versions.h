// Which NVSHMEM goes with which.
#pragma once

#include <string>

#include "rail/nvshmem/library.h"

namespace deep_ep::rail::nvshmem {

std::string text(const Version& version);

bool operator==(const Version& a, const Version& b);

// "" or why device code of NVSHMEM `built` must not run with the host library `loaded`. NVIDIA promises that a later host
// library serves earlier device code of its major version. 3.5.19 broke that for IBGDA: such a job hangs at its first put.
std::string why_unfit(const Version& built, const Version& loaded);

}  // namespace deep_ep::rail::nvshmem
