// The Python face: every function takes the 8-byte fields of its argument struct in order, and runs without the GIL.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>

#include "arguments.hpp"
#include "choosing.hpp"
#include "columns.hpp"
#include "decode_step.hpp"
#include "files.hpp"
#include "memory.hpp"
#include "places.hpp"

namespace baseline { extern const Level level; }
#if defined(__x86_64__)
namespace avx2 { extern const Level level; }
namespace avx512 { extern const Level level, level_vnni; }
#endif

namespace {

struct Named {
  const char* name;
  const Level* level;
  bool usable;
};

Named levels[] = {
#if defined(__x86_64__)
    {"avx512vnni", &avx512::level_vnni, false},
    {"avx512", &avx512::level, false},
    {"avx2", &avx2::level, false},
#endif
    {"baseline", &baseline::level, true},
};
const Named* used = nullptr;

void detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  levels[2].usable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  levels[1].usable = levels[2].usable && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if !defined(__clang__)  // which refuses an instruction, written out, of what it does not compile for
  levels[0].usable = levels[1].usable && __builtin_cpu_supports("avx512vnni");
#endif
#endif
  for (const Named& level : levels)
    if (level.usable && !used) used = &level;
}

// Fill a struct of 8-byte fields: one letter of `fields` each, 'i' for an integer or an address, 'd' for a double.
bool parse(PyObject* const* args, Py_ssize_t count, const char* fields, void* to) {
  const Py_ssize_t expected = Py_ssize_t(std::strlen(fields));
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return false;
  }
  char* field = static_cast<char*>(to);
  for (Py_ssize_t i = 0; i < count; ++i, field += 8) {
    if (fields[i] == 'd') {
      const double x = PyFloat_AsDouble(args[i]);
      if (x == -1.0 && PyErr_Occurred()) return false;
      std::memcpy(field, &x, 8);
    } else {
      const int64_t x = PyLong_AsLongLong(args[i]);
      if (x == -1 && PyErr_Occurred()) return false;
      std::memcpy(field, &x, 8);
    }
  }
  return true;
}

PyObject* finish(int status) {
  switch (status) {
    case OK: Py_RETURN_NONE;
    case OUT_OF_MEMORY: return PyErr_NoMemory();
    case INDEX_OUT_OF_RANGE: PyErr_SetString(PyExc_IndexError, "index must name slots below the number of slots"); break;
    case FLAT_OUT_OF_RANGE:
      PyErr_SetString(PyExc_ValueError, "starts and lengths must lie within the rows of keys and values, and lengths within positions");
      break;
    default: PyErr_Format(PyExc_RuntimeError, "unknown status %d", status);
  }
  return nullptr;
}

template <class Arguments>
PyObject* call(PyObject* const* args, Py_ssize_t count, const char* fields, int (*function)(const Arguments&)) {
  Arguments arguments;
  if (!parse(args, count, fields, &arguments)) return nullptr;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = function(arguments);
  Py_END_ALLOW_THREADS
  return finish(status);
}

#define OPERATION(name, Arguments, fields, function)                                               \
  static_assert(sizeof(fields) - 1 == sizeof(Arguments) / 8, "one letter a field of " #Arguments);  \
  PyObject* call_##name(PyObject*, PyObject* const* args, Py_ssize_t count) {                       \
    return call<Arguments>(args, count, fields, function);                                          \
  }

#define SLOTS "iiiiiiiiiiiiiiiiiiiiiiiiiiiiiii"
static_assert(sizeof(SLOTS) - 1 == sizeof(Slots) / 8, "one letter a field of Slots");
#define ATTENTION "iiiii" "iiiii" SLOTS "iii" "dd" "i" "iiiii" "iii" "ii"

OPERATION(attention, Attention, ATTENTION, used->level->attention)
OPERATION(attention_mass, Mass, ATTENTION "dii" "ii", used->level->attention_mass)
OPERATION(head_vote, Vote, ATTENTION, used->level->head_vote)
OPERATION(group_products, Vote, ATTENTION, used->level->group_products)
OPERATION(page_bounds, PageBounds, "iiiiii" "iiiii" "iiii" "iii", used->level->page_bounds)
#define PAGE_SCORES "iiiiii" "iiii" "ii" "iiiiiii" "i"
#define PAGE_SLOTS "iiiiiii" "iii" "i"
OPERATION(page_scores, PageScores, PAGE_SCORES, used->level->page_scores)
OPERATION(choose_pages, ChoosePages, PAGE_SCORES PAGE_SLOTS "ii" "iiii" "iii" "ii", used->level->choose_pages)
OPERATION(rotate, Rotation, "iiiiii" "iiiii" "iiiii" "iiii" "d" "iiii", used->level->rotate)
OPERATION(pack_int8, Packing, "iiiii" "iiii" "i" "ii", used->level->pack_int8)
OPERATION(pack_int4, Packing, "iiiii" "iiii" "i" "ii", used->level->pack_int4)
OPERATION(gather, Gather, "iiiiii" "iiii" "iii" "i", gather)
OPERATION(overwrite, Overwrite, "iiii" "iiii" "ii" "iii" "i", overwrite)
OPERATION(best_slots, BestSlots, "iiii" "ii" "i", best_slots)
OPERATION(listed_slots, ListedSlots, "iiiii" "ii", listed_slots)
OPERATION(page_slots, PageSlots, PAGE_SLOTS, page_slots)
OPERATION(find_places, FindPlaces, "iiii" "iii" "i" "iii" "ii", find_places)
OPERATION(rows_to_read, RowsToRead, "iii" "ii" "i" "iii" "ii" "iiii", rows_to_read)
OPERATION(read_rows, ReadRows, "i" "iii" "iii" "iii" "iii" "iii" "ii", read_rows)
OPERATION(close_file, CloseFile, "i", close_file)
OPERATION(prefer_large_pages, Region, "ii", prefer_large_pages)
OPERATION(weakest, Weakest, "iii" "iii" "iiii" "iii" "ii" "i", weakest)

PyObject* get_levels(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  if (!list) return nullptr;
  for (const Named& level : levels) {
    if (!level.usable) continue;
    PyObject* name = PyUnicode_FromString(level.name);
    if (!name || PyList_Append(list, name)) {
      Py_XDECREF(name);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return list;
}

PyObject* get_level(PyObject*, PyObject*) { return PyUnicode_FromString(used->name); }

PyObject* use_level(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const char* wanted = PyBytes_AsString(bytes);
  const Named* found = nullptr;
  for (const Named& level : levels)
    if (level.usable && !std::strcmp(level.name, wanted)) found = &level;
  Py_DECREF(bytes);
  if (!found) {
    PyErr_Format(PyExc_ValueError, "level must be one of levels(), got %R", name);
    return nullptr;
  }
  used = found;
  Py_RETURN_NONE;
}

// Whether the selection serves once more: True or False.
PyObject* call_reused_slots(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr char fields[] = "iii" "d" "iiii" "ii" "iiiii" "ii";
  static_assert(sizeof(fields) - 1 == sizeof(ReusedSlots) / 8, "one letter a field of ReusedSlots");
  ReusedSlots arguments;
  if (!parse(args, count, fields, &arguments)) return nullptr;
  return PyBool_FromLong(reused_slots(arguments));
}

// Fill structs from a buffer that holds them: a caller that calls again and again changes what differs in the buffer.
template <class Arguments>
bool read_buffer(PyObject* fields, Arguments* to, Py_ssize_t most, Py_ssize_t* count) {
  Py_buffer view;
  if (PyObject_GetBuffer(fields, &view, PyBUF_SIMPLE)) return false;
  const Py_ssize_t size = Py_ssize_t(sizeof *to);
  const bool fits = view.len % size == 0 && view.len > 0 && view.len <= most * size;
  if (fits) std::memcpy(to, view.buf, size_t(view.len));
  *count = view.len / size;
  PyBuffer_Release(&view);
  if (!fits) PyErr_Format(PyExc_TypeError, "expected a buffer of 1 to %zd times %zd bytes", most, size);
  return fits;
}

// As the operation of that name, once or a few times, its fields in a buffer.
template <class Arguments, Py_ssize_t MOST>
PyObject* call_again(PyObject* fields, int (*function)(const Arguments&)) {
  Arguments arguments[MOST];
  Py_ssize_t count;
  if (!read_buffer(fields, arguments, MOST, &count)) return nullptr;
  int status = OK;
  Py_BEGIN_ALLOW_THREADS
  for (Py_ssize_t i = 0; i < count && !status; ++i) status = function(arguments[i]);
  Py_END_ALLOW_THREADS
  return finish(status);
}

#define AGAIN(name, Arguments, most, function) \
  PyObject* call_##name##_again(PyObject*, PyObject* fields) { return call_again<Arguments, most>(fields, function); }

AGAIN(attention, Attention, 1, used->level->attention)
AGAIN(choose_pages, ChoosePages, 1, used->level->choose_pages)
AGAIN(rotate, Rotation, 1, used->level->rotate)
AGAIN(overwrite, Overwrite, 16, overwrite)

// Whether a selection was made anew: True or False.
PyObject* call_voted_slots(PyObject*, PyObject* fields) {
  VotedSlots arguments;
  Py_ssize_t count;
  if (!read_buffer(fields, &arguments, 1, &count)) return nullptr;
  int status;
  bool anew = false;
  Py_BEGIN_ALLOW_THREADS
  status = used->level->voted_slots(arguments, &anew);
  Py_END_ALLOW_THREADS
  return status ? finish(status) : PyBool_FromLong(anew);
}

// Buffers: DecodedToken, two Overwrite, two Rotation, VotedSlots, ChoosePages, FindPlaces, Attention, Eviction; all but the first two and
// Attention may be None.
// Whether a selection was made anew, and whether some of it lies nowhere yet: attention then waits for a call with `found`.
PyObject* call_decode_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) {
    PyErr_Format(PyExc_TypeError, "expected 8 arguments, got %zd", count);
    return nullptr;
  }
  DecodeStep step(*used->level);
  step.turned = args[2] != Py_None;
  step.voted = args[3] != Py_None;
  step.paged = args[4] != Py_None;
  step.placed = args[5] != Py_None;
  step.evicts = args[7] != Py_None;
  Py_ssize_t one, rows, turns = 2;
  if (!read_buffer(args[0], &step.token, 1, &one) || !read_buffer(args[1], step.rows, 2, &rows) ||
      (step.turned && !read_buffer(args[2], step.back, 2, &turns)) || (step.voted && !read_buffer(args[3], &step.vote, 1, &one)) ||
      (step.paged && !read_buffer(args[4], &step.pages, 1, &one)) || (step.placed && !read_buffer(args[5], &step.places, 1, &one)) ||
      !read_buffer(args[6], &step.attention, 1, &one) || (step.evicts && !read_buffer(args[7], &step.eviction, 1, &one)))
    return nullptr;
  if (rows != 2 || turns != 2) {
    PyErr_SetString(PyExc_TypeError, "expected the fields of two rows, and of two rotations or None");
    return nullptr;
  }
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = step.run();
  Py_END_ALLOW_THREADS
  return status ? finish(status) : Py_BuildValue("OO", step.anew ? Py_True : Py_False, step.missing ? Py_True : Py_False);
}

#define FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(function)), METH_FASTCALL

PyMethodDef methods[] = {
    // the order of the arguments is that of the structs in arguments.hpp
    {"attention", FAST(call_attention), "Attention over slots."},
    {"attention_again", call_attention_again, METH_O, "Attention over slots, its fields in a buffer."},
    {"choose_pages_again", call_choose_pages_again, METH_O, "As choose_pages, its fields in a buffer."},
    {"rotate_again", call_rotate_again, METH_O, "As rotate, its fields in a buffer."},
    {"overwrite_again", call_overwrite_again, METH_O, "As overwrite, the fields of up to 16 columns in a buffer."},
    {"attention_mass", FAST(call_attention_mass), "Column sums of attention weights."},
    {"head_vote", FAST(call_head_vote), "Softmax weights summed over all query heads."},
    {"group_products", FAST(call_group_products), "Largest dot product of each slot over the query heads of its KV head."},
    {"page_bounds", FAST(call_page_bounds), "Lowest and highest key of each page."},
    {"page_scores", FAST(call_page_scores), "Upper bounds of a query's scores over pages."},
    {"choose_pages", FAST(call_choose_pages), "A key taken into its page, and the slots of the best pages."},
    {"rotate", FAST(call_rotate), "Rotary position embedding."},
    {"pack_int8", FAST(call_pack_int8), "Rows as int8 with a scale each."},
    {"pack_int4", FAST(call_pack_int4), "Rows turned and rounded to int4, with a scale each."},
    {"gather", FAST(call_gather), "Rows of a column by slot index."},
    {"overwrite", FAST(call_overwrite), "One new row a head into a column."},
    {"best_slots", FAST(call_best_slots), "The slots of highest score of each row."},
    {"page_slots", FAST(call_page_slots), "The slots of the best pages of each head."},
    {"listed_slots", FAST(call_listed_slots), "Sinks, chosen slots and the last ones."},
    {"voted_slots", call_voted_slots, METH_O, "A selection used once more, or made anew by votes; its fields in a buffer."},
    {"decode_step", FAST(call_decode_step), "A token written to its slot, slots chosen and attended to; the fields in buffers."},
    {"reused_slots", FAST(call_reused_slots), "A selection used once more, if the query has hardly turned."},
    {"find_places", FAST(call_find_places), "Where copies of slots lie, and which give way."},
    {"rows_to_read", FAST(call_rows_to_read), "In which rows of which blocks slots lie."},
    {"read_rows", FAST(call_read_rows), "Rows of files of equal rows."},
    {"close_file", FAST(call_close_file), "Close a file that read_rows kept open."},
    {"prefer_large_pages", FAST(call_prefer_large_pages), "Ask the system to back memory with large pages."},
    {"weakest", FAST(call_weakest), "The slot to evict of each head."},
    {"levels", get_levels, METH_NOARGS, "The instruction sets this machine can run, best first."},
    {"level", get_level, METH_NOARGS, "The instruction set in use."},
    {"use_level", use_level, METH_O, "Use another of levels(), for every later call of the process (for tests)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Operations on slots for CPUs.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  detect();
  return PyModule_Create(&definition);
}
