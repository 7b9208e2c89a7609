/*
 * The functions of errand_boy._native that cffi can't provide, because cffi releases the GIL around each call, and
 * another thread that is busy in Python gives it back only after 5 ms.  A quick start must keep it.
 */
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include "caller/module.h"

#include "caller/direct.h"
#include "common/descriptor.h"
#include "common/rawsys.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAST_BYTES = 4096, MOST_LAST_READS = 16 };

/* Sets or resets the process of `owner`, before any other code of the caller runs. */
static int set_process(PyObject *owner, const struct eb_direct *d, bool created)
{
    PyObject *pid = PyLong_FromLong(d->pid);
    int result = pid == NULL ? -1 : 0;
    if (result == 0 && created)
        result = PyObject_SetAttrString(owner, "pid", pid);
    if (result == 0)
        result = PyObject_SetAttrString(owner, "_child_created", created ? Py_True : Py_False);
    Py_XDECREF(pid);
    return result;
}

static const char START[] = "errand_boy start", LEFT[] = "errand_boy start, left";

/* An exception, for instance from a signal handler, drops a pending start at once, because the code that gets the
 * exception closes the descriptors that the child must take over. */
static void drop(PyObject *start)
{
    struct eb_direct *d = PyCapsule_GetPointer(start, START);
    if (d == NULL) {
        PyErr_Clear(); /* the start has been left */
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    eb_direct_give(d);
    Py_END_ALLOW_THREADS
}

/* In headers from 3.12 on, Py_RETURN_NONE counts no reference, but older Pythons need one. */
static PyObject *none(void)
{
    Py_INCREF(Py_None);
    return Py_None;
}

/* None if the program runs, else (errno, stage, member). */
static PyObject *outcome(const struct eb_direct *d)
{
    if (d->error == 0)
        return none();
    return Py_BuildValue("iii", d->error, (int)d->stage, (int)d->member);
}

static void reap_if_failed(struct eb_direct *d)
{
    if (d->error == 0 || d->pid == 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    eb_direct_reap(d);
    Py_END_ALLOW_THREADS
}

/* Whether the last starts have come from several threads. */
static bool has_many_starters(void)
{
    static unsigned long last;
    static int changes; /* grows with each start by another thread than the last, shrinks with each by the same */
    enum { MANY = 4, MOST = 8 };
    unsigned long thread = PyThread_get_thread_ident();
    int count = __atomic_load_n(&changes, __ATOMIC_RELAXED);
    if (__atomic_exchange_n(&last, thread, __ATOMIC_RELAXED) != thread)
        count = count + MANY < MOST ? count + MANY : MOST;
    else if (count > 0)
        count--;
    __atomic_store_n(&changes, count, __ATOMIC_RELAXED);
    return count >= MANY;
}

/*
 * Keeps the GIL, because a thread that is busy in Python gives it back only after 5 ms.  But if several threads start
 * commands, the new processes wait for a CPU, and the other threads should go on meanwhile.
 */
static bool await_outcome(struct eb_direct *d, uint32_t microseconds)
{
    bool decided;
    if (!has_many_starters())
        return eb_direct_wait(d, microseconds);
    Py_BEGIN_ALLOW_THREADS
    decided = eb_direct_wait(d, microseconds);
    Py_END_ALLOW_THREADS
    return decided;
}

/* Returns the integers of a list, allocated, or NULL with an exception. */
static int *integers(PyObject *list, uint32_t *count)
{
    Py_ssize_t size = PyList_Size(list);
    if (size < 0)
        return NULL;
    int *values = malloc(((size_t)size + 1) * sizeof *values);
    if (values == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < size; i++)
        values[i] = (int)PyLong_AsLong(PyList_GetItem(list, i));
    if (PyErr_Occurred()) {
        free(values);
        return NULL;
    }
    *count = (uint32_t)size;
    return values;
}

/* spawn(owner, options, stdin, stdout, stderr, others, carried, flags, microseconds): see errand_boy/_process/direct.py. */
static PyObject *spawn(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct eb_wanted_fds wanted = {0};
    int *others = NULL, *carried = NULL;
    char *options;
    Py_ssize_t size;
    (void)module;
    if (count != 9) {
        PyErr_SetString(PyExc_TypeError, "spawn takes 9 arguments");
        return NULL;
    }
    if (PyBytes_AsStringAndSize(args[1], &options, &size) != 0)
        return NULL;
    for (int i = 0; i < 3; i++)
        wanted.standard[i] = (int)PyLong_AsLong(args[2 + i]);
    int flags = (int)PyLong_AsLong(args[7]);
    long microseconds = PyLong_AsLong(args[8]);
    if (PyErr_Occurred())
        return NULL;
    if (PyList_Size(args[5]) != 0 && (wanted.others = others = integers(args[5], &wanted.other_count)) == NULL)
        return NULL;
    if (PyList_Size(args[6]) != 0 && (wanted.carried = carried = integers(args[6], &wanted.carried_count)) == NULL) {
        free(others);
        return NULL;
    }
    struct eb_direct *d = eb_direct_take();
    if (d == NULL) {
        free(others);
        free(carried);
        return PyErr_NoMemory();
    }
    bool decided = eb_direct_begin(d, flags, (const uint8_t *)options, (size_t)size, &wanted) != 0;
    free(others);
    free(carried);
    if (!decided)
        decided = await_outcome(d, (uint32_t)microseconds);
    bool failed = decided && d->error != 0;
    if (failed)
        reap_if_failed(d);
    else if (set_process(args[0], d, true) != 0)
        decided = false; /* the attribute can't be set, but the child goes on */
    PyObject *result = PyErr_Occurred() ? NULL : decided ? outcome(d) : PyCapsule_New(d, START, drop);
    if (decided || result == NULL)
        eb_direct_give(d);
    return result;
}

/* await_spawn(owner, start, microseconds) */
static PyObject *await_spawn(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    int decided;
    (void)module;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "await_spawn takes 3 arguments");
        return NULL;
    }
    struct eb_direct *d = PyCapsule_GetPointer(args[1], START);
    if (d == NULL)
        return NULL;
    long microseconds = PyLong_AsLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    pid_t pid = d->pid;
    Py_BEGIN_ALLOW_THREADS
    decided = eb_direct_wait(d, (uint32_t)microseconds);
    Py_END_ALLOW_THREADS
    if (decided && d->error != 0) {
        reap_if_failed(d);
        if (set_process(args[0], d, false) != 0)
            return NULL;
    } else if (d->pid != pid && set_process(args[0], d, true) != 0) { /* a new attempt */
        return NULL;
    }
    if (decided)
        return outcome(d);
    Py_INCREF(args[1]);
    return args[1];
}

/* leave_spawn(start) */
static PyObject *leave_spawn(PyObject *module, PyObject *start)
{
    (void)module;
    struct eb_direct *d = PyCapsule_GetPointer(start, START);
    if (d == NULL || PyCapsule_SetName(start, LEFT) != 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    eb_direct_give(d);
    Py_END_ALLOW_THREADS
    return none();
}

/* -- functions that Python's os and signal modules lack if Python was built with older headers -- */

static PyObject *number_or_error(long result)
{
    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

/* pidfd_open(pid) */
static PyObject *pidfd_open(PyObject *module, PyObject *pid)
{
    (void)module;
    long number = PyLong_AsLong(pid);
    if (PyErr_Occurred())
        return NULL;
    return number_or_error(eb_above_standard((int)syscall(SYS_pidfd_open, (pid_t)number, 0)));
}

/* pidfd_send_signal(pidfd, number, flags) */
static PyObject *pidfd_send_signal(PyObject *module, PyObject *args)
{
    int pidfd, number;
    unsigned flags;
    (void)module;
    if (!PyArg_ParseTuple(args, "iiI", &pidfd, &number, &flags))
        return NULL;
    return number_or_error(syscall(SYS_pidfd_send_signal, pidfd, number, NULL, flags));
}

/* memfd_create(name, flags) */
static PyObject *open_memory(PyObject *module, PyObject *args)
{
    const char *name;
    unsigned flags;
    (void)module;
    if (!PyArg_ParseTuple(args, "sI", &name, &flags))
        return NULL;
    return number_or_error(eb_above_standard((int)syscall(SYS_memfd_create, name, flags)));
}

/* wait4(pid, options): (pid, status, usage), the last as the kernel's bytes, because making an object of each number
 * takes as long as the rest. */
static PyObject *wait_with_usage(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    int status = 0;
    struct rusage usage;
    pid_t pid;
    (void)module;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "wait4 takes 2 arguments");
        return NULL;
    }
    pid_t wanted = (pid_t)PyLong_AsLong(args[0]);
    int options = (int)PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    memset(&usage, 0, sizeof usage);
    do {
        Py_BEGIN_ALLOW_THREADS
        pid = wait4(wanted, &status, options, &usage);
        Py_END_ALLOW_THREADS
    } while (pid < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
    if (pid < 0)
        return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
    PyObject *raw = PyBytes_FromStringAndSize((const char *)&usage, sizeof usage);
    return raw == NULL ? NULL : Py_BuildValue("iiN", (int)pid, status, raw);
}

static PyMethodDef functions[] = {
    {"spawn", (PyCFunction)(void (*)(void))spawn, METH_FASTCALL, NULL},
    {"await_spawn", (PyCFunction)(void (*)(void))await_spawn, METH_FASTCALL, NULL},
    {"leave_spawn", leave_spawn, METH_O, NULL},
    {"wait4", (PyCFunction)(void (*)(void))wait_with_usage, METH_FASTCALL, NULL},
    {"pidfd_open", pidfd_open, METH_O, NULL},
    {"pidfd_send_signal", pidfd_send_signal, METH_VARARGS, NULL},
    {"memfd_create", open_memory, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

PyMODINIT_FUNC eb_init_by_cffi(void);
PyMODINIT_FUNC PyInit__native(void);

/* Runs in the interpreter that imports the module, which may be one of several. */
PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = eb_init_by_cffi();
    if (module != NULL && PyModule_AddFunctions(module, functions) != 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}

int eb_send_request(struct eb_spawn_frame *o, const struct eb_caller *start, int helper, int flags, int fd,
                    uint64_t device, uint64_t inode, const uint8_t *options, size_t options_size, int in, int out,
                    int err, const int *others, uint32_t other_count, const int *carried, uint32_t carried_count)
{
    const struct eb_wanted_fds wanted = {.standard = {in, out, err},
                                         .others = others,
                                         .other_count = other_count,
                                         .carried = carried,
                                         .carried_count = carried_count};
    int found = eb_caller_read(&o->caller, start, helper, flags, fd, device, inode);
    if (found < 0 || (start != NULL && !(found & EB_FITS)))
        return found;
    PyGILState_STATE state = 0;
    if (flags & EB_WITH_ENVIRONMENT)
        state = PyGILState_Ensure();
    int error = eb_spawn_frame_build(o, found, flags, options, options_size, &wanted);
    if (flags & EB_WITH_ENVIRONMENT)
        PyGILState_Release(state);
    if (error != 0)
        return -error;
    if (found & EB_CONNECTION && !(found & EB_UNSURE))
        eb_spawn_frame_send(o, fd);
    if (o->sent < o->size)
        return found;
    eb_spawn_frame_done(o);
    return found | EB_SENT;
}

void eb_close_all(const int *fds, const uint8_t *unread, size_t count)
{
    char data[LAST_BYTES];
    for (size_t i = 0; i < count; i++) {
        for (int reads = unread[i] ? MOST_LAST_READS : 0; reads > 0; reads--)
            if (recv(fds[i], data, sizeof data, MSG_DONTWAIT) <= 0)
                break;
        close(fds[i]);
    }
}

int eb_await_readable(int fd)
{
    struct pollfd wanted = {.fd = fd, .events = POLLIN};
    return poll(&wanted, 1, -1);
}
