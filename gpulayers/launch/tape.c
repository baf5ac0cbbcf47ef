/* A tape: what a launcher did on the host, done again by one call (``_tape.py`` says what its parts mean).

   Plain C over Python's API and four functions of the driver, found where it is loaded: no header of torch or CUDA. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <alloca.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*launch_t)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
static launch_t launch;
static int (*launch_cooperatively)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **);
static int (*replace_address)(void *, void *);
static int (*current_device)(int *);
static PyObject *data, *ptr;

typedef struct { uint64_t function; uint32_t grid[3], block[3], shared, first; } Launch; /* first: of its parameters */
enum { COOPERATIVE = 1u << 31 };                                                         /* a bit of shared */
typedef struct { int64_t delta; uint32_t at, slot, kind, unused; } Patch;                /* what goes where in the block */
enum { POINTER, MAP, FLOAT, DOUBLE };                                                    /* kinds of Patch */

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *address, *stream, *device, *allocations, *returned, *kept, *same, *asked, *quiet;
  Py_buffer block, params, launches, patches, modulo;
  Py_ssize_t numbers;
  int ordinal;
} Tape;

/* The address of an array's first element: what the function for it says; without one, array.data.ptr. */
static int address_of(const Tape *self, PyObject *x, uint64_t *found) {
  PyObject *number;
  if (self->address != Py_None) {
    number = PyObject_Vectorcall(self->address, &x, 1, NULL);
  } else {
    PyObject *memory = PyObject_GetAttr(x, data);
    number = memory ? PyObject_GetAttr(memory, ptr) : NULL;
    Py_XDECREF(memory);
  }
  if (!number) return -1;
  *found = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  return *found == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

/* Whether all is as it was when the tape was recorded: 1, 0, or -1 with an error. */
static int is_current(const Tape *self) {
  PyObject *const *same = &PyTuple_GET_ITEM(self->same, 0);                 /* (dict, key, value, dict, …) */
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(self->same); i + 2 < n; i += 3) {
    PyObject *now = PyDict_GetItemWithError(same[i], same[i + 1]);
    if (!now && PyErr_Occurred()) return -1;
    if ((now ? now : Py_None) != same[i + 2]) return 0;
  }
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(self->quiet); i < n; i++)
    if (PyList_GET_SIZE(PyTuple_GET_ITEM(self->quiet, i))) return 0;
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(self->asked); i + 1 < n; i += 2) {        /* (question, answer, …) */
    PyObject *answer = PyObject_CallNoArgs(PyTuple_GET_ITEM(self->asked, i));
    if (!answer) return -1;
    int equal = PyObject_RichCompareBool(answer, PyTuple_GET_ITEM(self->asked, i + 1), Py_EQ);
    Py_DECREF(answer);
    if (equal <= 0) return equal;
  }
  return 1;
}

static PyObject *replay(Tape *self, PyObject *const *given, size_t nargsf, PyObject *names) {
  Py_ssize_t fresh = PyTuple_GET_SIZE(self->allocations), n = self->modulo.len - fresh, made = 0;
  if (names || PyVectorcall_NARGS(nargsf) != n + self->numbers) {
    PyErr_SetString(PyExc_TypeError, "tape: it takes the arrays and then the numbers that it was recorded with");
    return NULL;
  }
  int on = -1; /* allocations are made on the current device; a thread may have none yet */
  if (current_device(&on) || on != self->ordinal) Py_RETURN_NOTIMPLEMENTED;
  int current = is_current(self);
  if (current < 0) return NULL;
  if (!current) Py_RETURN_NOTIMPLEMENTED;

  const uint8_t *modulo = self->modulo.buf;
  uint64_t *pointers = alloca((n + fresh + 1) * sizeof(uint64_t));
  PyObject **arrays = alloca((n + fresh + 1) * sizeof(PyObject *)), *found = NULL;
  for (Py_ssize_t i = 0; i < n + fresh; i++) {
    if (i < n) arrays[i] = given[i];
    else {
      PyObject *how = PyTuple_GET_ITEM(self->allocations, i - n); /* (function, *its arguments) */
      PyObject **items = &PyTuple_GET_ITEM(how, 0);
      if (!(arrays[i] = PyObject_Vectorcall(items[0], items + 1, PyTuple_GET_SIZE(how) - 1, NULL))) goto done;
      made++;
    }
    if (arrays[i] == Py_None) pointers[i] = 0;
    else if (address_of(self, arrays[i], &pointers[i])) goto done;
    if ((pointers[i] & 15) != modulo[i]) { found = Py_NewRef(Py_NotImplemented); goto done; }
  }
  void *stream = NULL;
  if (self->stream != Py_None) {
    PyObject *number = PyObject_CallOneArg(self->stream, self->device);
    if (!number) goto done;
    stream = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    if (!stream && PyErr_Occurred()) goto done;
  }

  /* The arguments lie on this stack: several threads use a tape, and the lock is let go below. */
  char *block = (char *)(((uintptr_t)alloca(self->block.len + 64) + 63) & ~(uintptr_t)63);
  memcpy(block, self->block.buf, self->block.len);
  const uint32_t *at = self->params.buf;
  Py_ssize_t count = self->params.len / sizeof(uint32_t);
  void **params = alloca((count + 1) * sizeof(void *));
  for (Py_ssize_t i = 0; i < count; i++) params[i] = block + at[i];
  for (const Patch *p = self->patches.buf, *end = p + self->patches.len / sizeof(Patch); p < end; p++) {
    if (p->kind == POINTER) { uint64_t pointer = pointers[p->slot] + p->delta; memcpy(block + p->at, &pointer, 8); }
    else if (p->kind == MAP) {
      if (replace_address(block + p->at, (void *)(pointers[p->slot] + p->delta))) {
        PyErr_SetString(PyExc_RuntimeError, "cuTensorMapReplaceAddress failed");
        goto done;
      }
    } else {
      double number = PyFloat_AsDouble(given[n + p->slot]);
      if (number == -1.0 && PyErr_Occurred()) goto done;
      float half = (float)number;
      if (p->kind == FLOAT) memcpy(block + p->at, &half, 4); else memcpy(block + p->at, &number, 8);
    }
  }
  int error = 0;
  Py_BEGIN_ALLOW_THREADS
  for (const Launch *l = self->launches.buf, *end = l + self->launches.len / sizeof(Launch); l < end && !error; l++)
    if (l->shared & COOPERATIVE)
      error = launch_cooperatively((void *)l->function, l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1],
                                   l->block[2], l->shared & ~COOPERATIVE, stream, params + l->first);
    else
      error = launch((void *)l->function, l->grid[0], l->grid[1], l->grid[2], l->block[0], l->block[1], l->block[2], l->shared,
                     stream, params + l->first, NULL);
  Py_END_ALLOW_THREADS
  if (error) { PyErr_Format(PyExc_RuntimeError, "cuLaunchKernel failed: CUDA error %d", error); goto done; }

  Py_ssize_t outs = PyTuple_GET_SIZE(self->returned);
  if (!(found = PyTuple_New(outs))) goto done;
  for (Py_ssize_t i = 0; i < outs; i++) {
    PyObject *slot = PyTuple_GET_ITEM(self->returned, i);
    PyTuple_SET_ITEM(found, i, Py_NewRef(slot == Py_None ? Py_None : arrays[PyLong_AsLong(slot)]));
  }
done:
  for (Py_ssize_t i = 0; i < made; i++) Py_DECREF(arrays[n + i]);
  return found;
}

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Tape *self = (Tape *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->call = (vectorcallfunc)replay;
  PyObject *a, *s, *d, *l, *r, *k, *m, *q, *e;
  if (!PyArg_ParseTuple(args, "OOOO!O!OO!O!O!ny*y*y*y*y*", &a, &s, &d, &PyTuple_Type, &l, &PyTuple_Type, &r, &k, &PyTuple_Type, &m,
                        &PyTuple_Type, &q, &PyTuple_Type, &e, &self->numbers, &self->block, &self->params, &self->launches,
                        &self->patches, &self->modulo)) { Py_DECREF(self); return NULL; }
  PyObject *parts[] = {a, s, d, l, r, k, m, q, e};
  for (int i = 0; i < 9; i++) (&self->address)[i] = Py_NewRef(parts[i]);
  self->ordinal = (int)PyLong_AsLong(d);
  int maps = 0;
  for (const Patch *p = self->patches.buf, *end = p + self->patches.len / sizeof(Patch); p < end; p++) maps |= p->kind == MAP;
  if (maps && !replace_address) PyErr_SetString(PyExc_NotImplementedError, "the driver has no cuTensorMapReplaceAddress");
  if (PyErr_Occurred()) { Py_DECREF(self); return NULL; }
  return (PyObject *)self;
}
static int traverse(Tape *self, visitproc visit, void *arg) {
  for (int i = 0; i < 9; i++) Py_VISIT((&self->address)[i]);
  return 0;
}
static int clear(Tape *self) {
  for (int i = 0; i < 9; i++) Py_CLEAR((&self->address)[i]);
  return 0;
}
static void dealloc(Tape *self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  Py_buffer *buffers[] = {&self->block, &self->params, &self->launches, &self->patches, &self->modulo};
  for (int i = 0; i < 5; i++) PyBuffer_Release(buffers[i]);
  Py_TYPE(self)->tp_free((PyObject *)self);
}
static PyObject *current(Tape *self, PyObject *unused) {
  int found = is_current(self);
  return found < 0 ? NULL : PyBool_FromLong(found);
}
static PyMemberDef members[] = {
  {"kept", T_OBJECT, offsetof(Tape, kept), READONLY, "The compiled kernels that it launches."}, {NULL}};
static PyMethodDef methods[] = {
  {"is_current", (PyCFunction)current, METH_NOARGS, "Whether all that was read while it was recorded is as it was."}, {NULL}};
static PyTypeObject TapeType = {
  PyVarObject_HEAD_INIT(NULL, 0).tp_name = "gpulayers.launch.Tape", .tp_basicsize = sizeof(Tape),
  .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC, .tp_new = new, .tp_methods = methods, .tp_members = members,
  .tp_dealloc = (destructor)dealloc, .tp_traverse = (traverseproc)traverse, .tp_clear = (inquiry)clear,
  .tp_call = PyVectorcall_Call, .tp_vectorcall_offset = offsetof(Tape, call)};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "gpulayers_tape", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_gpulayers_tape(void) {
  void *cuda = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!cuda || !(launch = dlsym(cuda, "cuLaunchKernel")) ||
      !(launch_cooperatively = dlsym(cuda, "cuLaunchCooperativeKernel")) || !(current_device = dlsym(cuda, "cuCtxGetDevice"))) {
    PyErr_SetString(PyExc_ImportError, "no libcuda.so.1");
    return NULL;
  }
  replace_address = dlsym(cuda, "cuTensorMapReplaceAddress"); /* since CUDA 12.0 */
  data = PyUnicode_InternFromString("data");
  ptr = PyUnicode_InternFromString("ptr");
  PyObject *m = data && ptr && PyType_Ready(&TapeType) >= 0 ? PyModule_Create(&module) : NULL;
  if (!m || PyModule_AddObject(m, "Tape", Py_NewRef(&TapeType)) < 0) return NULL;
  return m;
}
