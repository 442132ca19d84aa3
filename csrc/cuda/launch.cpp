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

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

std::mutex cache_lock;

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Once per kernel and device: more than 48 KiB of shared memory, and clusters of 16.
void allow(const Launch& config, const void* kernel) {
  static std::map<std::pair<const void*, int>, std::pair<size_t, bool>> allowed;
  if (config.shared <= (48 << 10) && config.cluster <= 8) return;
  const std::lock_guard lock(cache_lock);
  auto& [shared, wide] = allowed[{kernel, current_device()}];
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

}  // namespace

OnDevice::OnDevice(int device) : device_(device), before_(current_device()) {
  if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
}

OnDevice::~OnDevice() {
  if (device_ != before_) cudaSetDevice(before_);
}

const Device& OnDevice::properties() const {
  static std::map<int, Device> known;
  const std::lock_guard lock(cache_lock);
  const auto found = known.find(device_);
  if (found != known.end()) return found->second;
  Device device;
  device.processors = attribute(cudaDevAttrMultiProcessorCount, device_);
  device.programmatic = attribute(cudaDevAttrComputeCapabilityMajor, device_) >= 9;
  device.max_cluster = attribute(cudaDevAttrClusterLaunch, device_) ? 8 : 1;  // what every such device has
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_);
  device.level2_bytes = attribute(cudaDevAttrL2CacheSize, device_);
  return known[device_] = device;
}

unsigned resident_blocks(const char* name, const void* kernel, unsigned threads, size_t shared) {
  static std::map<std::tuple<const void*, int, unsigned, size_t>, unsigned> known;
  allow({name, 1, threads, 1, shared}, kernel);
  const int device = current_device();
  const std::lock_guard lock(cache_lock);
  unsigned& blocks = known[{kernel, device, threads, shared}];
  if (blocks == 0) {
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared), name);
    blocks = static_cast<unsigned>(each) * attribute(cudaDevAttrMultiProcessorCount, device);
    if (blocks == 0) throw std::runtime_error(std::string(name) + ": no block of it fits on this device");
  }
  return blocks;
}

void launch_kernel(const Launch& config, const void* kernel, void* arguments) {
  allow(config, kernel);
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(config.blocks);
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = config.shared;
  launch.stream = static_cast<cudaStream_t>(config.stream);
  cudaLaunchAttribute attributes[2];
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
  void* parameters[] = {arguments};
  check(cudaLaunchKernelExC(&launch, kernel, parameters), config.name);
}

}  // namespace fdistill::gpu
