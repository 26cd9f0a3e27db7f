// Brings NVSHMEM and the library of this engine into the process, on first use.
#pragma once

#include <string>
#include <vector>

#include "rail/nvshmem/world.h"

namespace deep_ep::rail::nvshmem {

// `host_library`: a path of libnvshmem_host.so.3, for a process that has not loaded one yet. `engines`: files of the engine's
// library, named libdeep_ep_nvshmem-MAJOR.MINOR.PATCH-… after what they were built with; the first that fits is taken.
// Needs no GPU. Throws TransportError with what to do; then it may be tried again. Once it has succeeded it does nothing.
World& load_world(const std::string& host_library, const std::vector<std::string>& engines, Transport transport);

// Throws TransportError where none was loaded.
World& loaded_world();

}  // namespace deep_ep::rail::nvshmem
