/* The driver's interface, as far as bench/gpu_probe.py asks for it: gcc -shared -o libcuda.so.1 libcuda.c */
#include <stdint.h>
#include <stdlib.h>

#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define NOT_INITIALIZED 3
#define INVALID_DEVICE 101
#define INVALID_CONTEXT 201

static int initialized, current;

int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    initialized = 1;
    return 0;
}
int cuDeviceGet(int *device, int number) {
    if (!initialized) return NOT_INITIALIZED;
    if (number) return INVALID_DEVICE;
    *device = 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (!initialized) return NOT_INITIALIZED;
    if (device) return INVALID_DEVICE;
    *context = &initialized;
    return 0;
}
int cuCtxSetCurrent(void *context) {
    if (context != &initialized) return INVALID_CONTEXT;
    current = 1;
    return 0;
}
int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    if (!current) return INVALID_CONTEXT;
    *address = malloc(size);
    return *address ? 0 : OUT_OF_MEMORY;
}
int cuMemAlloc_v2(uint64_t *memory, size_t size) {
    if (!current) return INVALID_CONTEXT;
    *memory = (uint64_t)(uintptr_t)malloc(size);
    return *memory ? 0 : OUT_OF_MEMORY;
}
int cuMemFree_v2(uint64_t memory) {
    if (!memory) return INVALID_VALUE;
    free((void *)(uintptr_t)memory);
    return 0;
}
