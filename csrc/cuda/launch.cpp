// Launches over the CUDA runtime. Nothing here runs before the first call: the module loads on machines without a GPU.
#include "launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fdistill::gpu {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found by somebody else's check
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int device_index() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device_index()), "cudaDeviceGetAttribute");
  return value;
}

std::mutex cache_lock;

// Once per kernel and device: more than 48 KiB of shared memory, and clusters of 16.
void allow(const Launch& config, const void* kernel) {
  static std::map<std::pair<const void*, int>, std::pair<size_t, bool>> allowed;
  if (config.shared <= (48 << 10) && config.cluster <= 8) return;
  const std::lock_guard lock(cache_lock);
  auto& [shared, wide] = allowed[{kernel, device_index()}];
  if (config.shared > shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared)),
          config.name);
    shared = config.shared;
  }
  if (config.cluster > 8 && !wide) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), config.name);
    wide = true;
  }
}

// A launch as the runtime takes it.
struct Configuration {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attributes[2];

  explicit Configuration(const Launch& config) {
    launch.gridDim = dim3(config.blocks);
    launch.blockDim = dim3(config.threads);
    launch.dynamicSmemBytes = config.shared;
    launch.stream = static_cast<cudaStream_t>(config.stream);
    launch.attrs = attributes;
    if (config.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[launch.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = config.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (config.early) {
      cudaLaunchAttribute& early = attributes[launch.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

// The largest cluster, of eight blocks at most, that the multiprocessors of one group have room for: a part of a GPU may
// have fewer of them than a cluster has blocks.
int largest_cluster(const char* name, const void* kernel, unsigned threads, size_t shared) {
  allow({name, 1, threads, 1, shared}, kernel);
  for (unsigned cluster = 8; cluster > 1; cluster /= 2) {
    const Configuration config({name, cluster, threads, cluster, shared});
    int fitting = 0;
    if (cudaOccupancyMaxActiveClusters(&fitting, kernel, &config.launch) != cudaSuccess) cudaGetLastError();
    if (fitting > 0) return static_cast<int>(cluster);
  }
  return 1;
}

}  // namespace

const Device& current_device() {
  static std::map<int, Device> known;
  const int device = device_index();
  const std::lock_guard lock(cache_lock);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Device properties;
  properties.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties.level2_bytes = attribute(cudaDevAttrL2CacheSize);
  return known[device] = properties;
}

Code code_of(const char* name, const void* kernel, unsigned threads, size_t shared) {
  static std::map<std::pair<const void*, int>, Code> known;
  const std::pair<const void*, int> key{kernel, device_index()};
  {
    const std::lock_guard lock(cache_lock);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  // What __CUDA_ARCH__ was: also code that the driver has compiled for this device has no more than its PTX.
  Code code{1, attributes.ptxVersion >= 90};
  if (code.early && attribute(cudaDevAttrClusterLaunch) != 0)
    code.max_cluster = largest_cluster(name, kernel, threads, shared);
  const std::lock_guard lock(cache_lock);
  return known[key] = code;
}

unsigned resident_blocks(const char* name, const void* kernel, unsigned threads, size_t shared) {
  static std::map<std::tuple<const void*, int, unsigned, size_t>, unsigned> known;
  allow({name, 1, threads, 1, shared}, kernel);
  const int device = device_index();
  const std::lock_guard lock(cache_lock);
  unsigned& blocks = known[{kernel, device, threads, shared}];
  if (blocks == 0) {
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared), name);
    blocks = static_cast<unsigned>(each) * attribute(cudaDevAttrMultiProcessorCount);
    if (blocks == 0) throw std::runtime_error(std::string(name) + ": no block of it fits on this device");
  }
  return blocks;
}

void launch_kernel(const Launch& config, const void* kernel, void* arguments) {
  allow(config, kernel);
  const Configuration configuration(config);
  void* parameters[] = {arguments};
  check(cudaLaunchKernelExC(&configuration.launch, kernel, parameters), config.name);
}

}  // namespace fdistill::gpu
