/* A libcuda.so.1 that does nothing and notes what it was asked to launch: for the host's part of a launch, without a GPU.

   A kernel's parameters are known by its binary alone (KPARAM_INFO in .nv.info.<kernel>), so what is noted of a launch is
   what the kernel would have read: the bytes of each parameter, whoever laid them out. */
#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST 256
typedef struct { uint32_t count; uint32_t sizes[MOST]; char name[200]; } Function;
typedef struct { uint64_t function, stream; uint32_t grid[3], block[3], shared, bytes; } Launch; /* its parameters follow */

uint64_t null_launches = 0;
int null_device = 0, null_noting = 0;
char *null_notes = NULL;
uint64_t null_used = 0;
static uint64_t held = 0;
static int some = 1;

void null_note(int on) { null_noting = on; null_used = 0; }

static int launched(void *function, const uint32_t *sizes, void *stream, void **params) {
  __atomic_fetch_add(&null_launches, 1, __ATOMIC_RELAXED);
  if (!null_noting) return 0;
  Function *f = function;
  Launch l = {(uint64_t)f, (uint64_t)stream, {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, sizes[6], 0};
  for (uint32_t i = 0; i < f->count; i++) l.bytes += f->sizes[i];
  uint64_t need = null_used + sizeof l + l.bytes;
  if (need > held) null_notes = realloc(null_notes, held = 2 * need);
  memcpy(null_notes + null_used, &l, sizeof l);
  char *to = null_notes + null_used + sizeof l;
  for (uint32_t i = 0; i < f->count; to += f->sizes[i++]) memcpy(to, params[i], f->sizes[i]);
  null_used = need;
  return 0;
}

/* A kernel that was not compiled is its parameters' sizes: "NULL", how many, each (null_driver.py). */
static void read_hollow(const uint32_t *image, Function *f) {
  f->count = image[1];
  memcpy(f->sizes, image + 2, 4 * f->count);
}

/* The sizes of a kernel's parameters, from the ELF file that ptxas and NVRTC make. */
static void read_sizes(const char *image, const char *name, Function *f) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++) {
    const char *section = names + sections[i].sh_name;
    if (strncmp(section, ".nv.info.", 9) || strcmp(section + 9, name)) continue;
    const uint8_t *at = (const uint8_t *)image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      uint16_t length = at[2] | at[3] << 8;
      if (at[0] != 4) { at += 4; continue; }                       /* what is no sized value has its two bytes here */
      if (at[1] == 0x17) {                                         /* index, ordinal and offset, then flags and size */
        uint16_t ordinal; uint32_t flags;
        memcpy(&ordinal, at + 8, 2); memcpy(&flags, at + 12, 4);
        if (ordinal < MOST) f->sizes[ordinal] = flags >> 18;
        if (ordinal + 1u > f->count) f->count = ordinal + 1;
      }
      at += 4 + length;
    }
  }
}

int cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  Function *f = calloc(1, sizeof *f);
  strncpy(f->name, name, sizeof f->name - 1);
  if (!memcmp(module, "NULL", 4)) read_hollow(module, f);
  else if (!memcmp(module, ELFMAG, SELFMAG)) read_sizes(module, name, f);
  *function = f;
  return 0;
}
int cuLaunchKernelEx(const uint32_t *config, void *f, void **params, void **extra) {
  return launched(f, config, *(void *const *)(config + 8), params); /* seven numbers, padding, the stream */
}
int cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z, unsigned shared,
                   void *stream, void **params, void **extra) {
  uint32_t sizes[7] = {a, b, c, x, y, z, shared};
  return launched(f, sizes, stream, params);
}

int cuLaunchCooperativeKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z,
                              unsigned shared, void *stream, void **params) {
  uint32_t sizes[7] = {a, b, c, x, y, z, shared | 1u << 31}; /* the tape's way to say it */
  return launched(f, sizes, stream, params);
}

/* A tensor map here is its address, and then a digest of all else that it was made from. */
int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *steps,
                           const uint32_t *box, const uint32_t *each, int inter, int swizzle, int promotion, int fill) {
  uint64_t m[16] = {(uint64_t)address, type, rank, inter, swizzle, promotion, fill};
  for (unsigned i = 0; i < rank; i++) m[8 + i] = sizes[i] * 31 + box[i] * 7 + each[i] + (i ? steps[i - 1] * 127 : 0);
  memcpy(map, m, 128);
  return 0;
}
int cuTensorMapEncodeIm2col(void *map) { return 801; }
int cuTensorMapReplaceAddress(void *map, void *address) { memcpy(map, &address, 8); return 0; }

/* Whoever asks (NVRTC, CUDA's runtime) hears that there is no GPU. */
int cuInit(unsigned flags) { return 100; }
int cuGetExportTable(const void **table, const void *id) { *table = NULL; return 100; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuCtxGetCurrent(void **c) { *c = &some; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxGetDevice(int *d) { *d = null_device; return null_device < 0 ? 201 : 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &some; return 0; }
int cuModuleUnload(void *m) { return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : a == 4 ? 64 : 0; return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void *f, int c) { return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 97 ? 232448 : a == 16 ? 132 : a == 12 ? 65536 : a == 81 ? 233472 : 1000;
  return 0;
}
int cuGetErrorString(int e, const char **s) { *s = "null driver"; return 0; }
int cuCtxGetLimit(size_t *v, int l) { *v = 0; return 0; }
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuStreamIsCapturing(void *s, int *c) { *c = 0; return 0; }
int cuPointerGetAttribute(void *d, int a, uint64_t p) { *(uint64_t *)d = p; return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, const void *c) { *n = 1; return 0; }
