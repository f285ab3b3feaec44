/* Decodes one rectangle of a JPEG with the very libjpeg-turbo that Pillow has loaded.
 *
 * Same library, same pixels: nothing is linked. `bind` looks the functions up in the shared library that Pillow's own
 * extension module depends on, and refuses it if its structures are not those of libjpeg_abi.h. Anything that is not claimed
 * to be exact is declined, and Pillow decodes it.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "libjpeg_abi.h"

/* Fancy upsampling looks one sample beyond; a whole MCU row or column beside the rectangle is more than enough. */
#define MARGIN 32
/* A photograph has one scan, a progressive one about ten. */
#define MAX_SCANS 100

static struct {
    struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
    void (*create)(j_decompress_ptr, int, size_t);
    void (*destroy)(j_decompress_ptr);
    void (*mem_src)(j_decompress_ptr, const unsigned char *, unsigned long);
    int (*read_header)(j_decompress_ptr, boolean);
    boolean (*start)(j_decompress_ptr);
    JDIMENSION (*read_scanlines)(j_decompress_ptr, JSAMPARRAY, JDIMENSION);
    JDIMENSION (*skip_scanlines)(j_decompress_ptr, JDIMENSION);
    void (*crop_scanline)(j_decompress_ptr, JDIMENSION *, JDIMENSION *);
} lib;

/* The first member is libjpeg's, so that its pointer to it is one to this. */
typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf stop;
} Errors;

static void stop(j_common_ptr info) { longjmp(((Errors *)info->err)->stop, 1); }

static void stay_silent(j_common_ptr info) { (void)info; }

/* Warnings are counted (a negative level is one) and never printed. */
static void count(j_common_ptr info, int level) {
    if (level < 0) info->err->num_warnings++;
}

static void set_errors(struct jpeg_decompress_struct *info, Errors *errors) {
    info->err = lib.std_error(&errors->manager);
    errors->manager.error_exit = stop;
    errors->manager.emit_message = count;
    errors->manager.output_message = stay_silent;
}

typedef struct {
    int scans;           /* 0: the file does not go on to its end-of-image marker */
    int first_has;       /* components of the first scan */
    int ends_with_first; /* the marker follows the first scan's pixels at once */
} Course;

/* How the file goes on to its end-of-image marker: Pillow may refuse one that is cut short, wherever the cut lies. */
static Course course_of(const unsigned char *data, size_t size) {
    const Course none = {0, 0, 0};
    Course course = none;
    size_t at = 2;
    while (at + 4 <= size) {
        if (data[at] != 0xFF) return none;
        unsigned char marker = data[at + 1];
        if (marker == 0xFF) { /* a fill byte */
            at++;
            continue;
        }
        if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9)) return none;
        size_t length = ((size_t)data[at + 2] << 8) | data[at + 3];
        if (length < 2 || at + 2 + length > size) return none;
        if (marker == 0xDA && course.scans == 0) course.first_has = length > 2 ? data[at + 4] : 0;
        at += 2 + length;
        if (marker != 0xDA) continue;
        if (++course.scans > MAX_SCANS) return none;
        for (;;) { /* entropy-coded bytes up to a marker that is neither a stuffed byte nor a restart */
            const unsigned char *found = at < size ? memchr(data + at, 0xFF, size - at) : NULL;
            if (found == NULL || (size_t)(found - data) + 1 >= size) return none;
            at = (size_t)(found - data);
            unsigned char next = data[at + 1];
            if (next == 0xD9) {
                course.ends_with_first = course.scans == 1;
                return course;
            }
            if (next == 0xFF) {
                at++;
            } else if (next == 0x00 || (next >= 0xD0 && next <= 0xD7)) {
                at += 2;
            } else {
                break;
            }
        }
    }
    return none;
}

/* Whether libjpeg has read all of the file before it gives the first row, or nothing is left that it could refuse: when
 * Pillow is done with the rows of an image of one scan, it has libjpeg read on to the end. */
static int is_read_through(const struct jpeg_decompress_struct *info, Course course) {
    return course.ends_with_first || info->progressive_mode || course.first_has < info->num_components;
}

/* Grey, or three colours with the common samplings; the rest was never compared and is declined. */
static int is_common(const struct jpeg_decompress_struct *info) {
    if (info->data_precision != 8 || info->arith_code) return 0;
    const jpeg_component_info *part = info->comp_info;
    if (info->num_components == 1)
        return info->jpeg_color_space == JCS_GRAYSCALE && part[0].h_samp_factor == 1 && part[0].v_samp_factor == 1;
    if (info->num_components != 3) return 0;
    if (info->jpeg_color_space != JCS_YCbCr && info->jpeg_color_space != JCS_RGB) return 0;
    for (int number = 1; number < 3; number++)
        if (part[number].h_samp_factor != 1 || part[number].v_samp_factor != 1) return 0;
    int across = part[0].h_samp_factor, down = part[0].v_samp_factor;
    return (across == 1 && down == 1) || (across == 2 && down <= 2) || (across == 1 && down == 2);
}

typedef struct {
    JDIMENSION left, top, width, height;
} Box;

/* Reads the rows of a started image that the box needs; `row` holds one of them, `out` gets RGB. */
static void read_box(struct jpeg_decompress_struct *info, Box box, JDIMENSION first, JSAMPROW row, unsigned char *out) {
    JDIMENSION above = box.top > MARGIN ? box.top - MARGIN : 0;
    if (above > 0) lib.skip_scanlines(info, above);
    size_t samples = (size_t)info->output_components;
    const unsigned char *from = row + (box.left - first) * samples;
    while (info->output_scanline < box.top + box.height) {
        JDIMENSION number = info->output_scanline;
        lib.read_scanlines(info, &row, 1);
        if (number < box.top) continue;
        unsigned char *to = out + (size_t)(number - box.top) * box.width * 3;
        if (samples == 3) {
            memcpy(to, from, (size_t)box.width * 3);
        } else {
            for (JDIMENSION x = 0; x < box.width; x++) memset(to + 3 * x, from[x], 3);
        }
    }
}

/* 1 when `out` holds the box, 0 when the file is declined. Runs without the interpreter's lock. */
static int decode(const unsigned char *data, size_t size, Box box, unsigned char *out) {
    Course course = course_of(data, size);
    if (course.scans == 0) return 0;
    struct jpeg_decompress_struct info;
    Errors errors;
    /* Both change between setjmp and longjmp. */
    unsigned char *volatile row = NULL;
    volatile int whole = 0;
    memset(&info, 0, sizeof info);
    set_errors(&info, &errors);
    if (setjmp(errors.stop) == 0) {
        lib.create(&info, JPEG_LIB_VERSION, sizeof info);
        lib.mem_src(&info, data, (unsigned long)size);
        lib.read_header(&info, 1);
        if (is_common(&info) && is_read_through(&info, course) && box.left + box.width <= info.image_width &&
            box.top + box.height <= info.image_height) {
            info.out_color_space = info.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
            lib.start(&info);
            JDIMENSION first = box.left > MARGIN ? box.left - MARGIN : 0;
            JDIMENSION wanted = box.left + box.width + MARGIN - first;
            if (first + wanted > info.output_width) wanted = info.output_width - first;
            lib.crop_scanline(&info, &first, &wanted);
            row = malloc((size_t)info.output_width * (size_t)info.output_components);
            if (row != NULL && first <= box.left && first + info.output_width >= box.left + box.width) {
                read_box(&info, box, first, row, out);
                whole = errors.manager.num_warnings == 0;
            }
        }
    } else {
        whole = 0;
    }
    lib.destroy(&info);
    free(row);
    return whole;
}

static PyObject *decode_region(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data;
    unsigned int left, top, width, height;
    if (!PyArg_ParseTuple(args, "y*IIII:decode_region", &data, &left, &top, &width, &height)) return NULL;
    PyObject *made = NULL;
    if (lib.create == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "bind() comes first");
    } else if (width < 1 || height < 1 || left > 65500 || top > 65500 || width > 65500 || height > 65500) {
        PyErr_SetString(PyExc_ValueError, "no JPEG has such a region");
    } else if ((made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)width * height * 3)) != NULL) {
        Box box = {left, top, width, height};
        unsigned char *out = (unsigned char *)PyBytes_AsString(made);
        int whole;
        Py_BEGIN_ALLOW_THREADS
        whole = decode(data.buf, (size_t)data.len, box, out);
        Py_END_ALLOW_THREADS
        if (!whole) {
            Py_DECREF(made);
            made = Py_None;
            Py_INCREF(made);
        }
    }
    PyBuffer_Release(&data);
    return made;
}

/* A grey image of 9 × 5 pixels and three components, the first sampled twice across. It is progressive, so that the
 * members `progressive_mode` and `arith_code` differ; that also spares a table. */
enum { SAMPLE_WIDTH = 9, SAMPLE_HEIGHT = 5, SAMPLE_GREY = 128 };
#define EIGHT_ONES 1, 1, 1, 1, 1, 1, 1, 1
static const unsigned char sample[] = {
    0xFF, 0xD8,                                                                         /* start of image */
    0xFF, 0xDB, 0, 67, 0, EIGHT_ONES, EIGHT_ONES, EIGHT_ONES, EIGHT_ONES, EIGHT_ONES,   /* 64 quantizers, */
    EIGHT_ONES, EIGHT_ONES, EIGHT_ONES,                                                 /* all 1 */
    0xFF, 0xC2, 0, 17, 8, 0, SAMPLE_HEIGHT, 0, SAMPLE_WIDTH, 3,                         /* progressive frame */
    1, 0x21, 0, 2, 0x11, 0, 3, 0x11, 0,                                                 /* 4:2:2 */
    0xFF, 0xC4, 0, 20, 0x00, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,         /* one code: a zero bit */
    0xFF, 0xDA, 0, 12, 3, 1, 0x00, 2, 0x00, 3, 0x00, 0, 0, 0x00,                        /* scan of DC coefficients */
    0x0F,                                                                               /* four zeros, then padding */
    0xFF, 0xD9,                                                                         /* end of image */
};

/* Whether the sample's header is found in the members that are declared for it. Follows no pointer that may be none. */
static int has_header_of_sample(const struct jpeg_decompress_struct *info) {
    if (info->image_width != SAMPLE_WIDTH || info->image_height != SAMPLE_HEIGHT) return 0;
    if (info->num_components != 3 || info->data_precision != 8) return 0;
    if (info->jpeg_color_space != JCS_YCbCr || info->out_color_space != JCS_RGB) return 0;
    if (!info->progressive_mode || info->arith_code) return 0;
    const jpeg_component_info *part = info->comp_info;
    if (part == NULL) return 0;
    for (int number = 0; number < 3; number++) /* the scan has them in the order of the frame */
        if (info->cur_comp_info[number] != part + number) return 0;
    return part[0].h_samp_factor == 2 && part[0].v_samp_factor == 1 && part[1].h_samp_factor == 1;
}

/* Whether the first row of the sample is as it must be, and the members that tell how far decoding has come. */
static int has_row_of_sample(struct jpeg_decompress_struct *info) {
    unsigned char row[3 * SAMPLE_WIDTH] = {0};
    JSAMPROW rows[] = {row};
    lib.start(info);
    if (info->output_width != SAMPLE_WIDTH || info->output_height != SAMPLE_HEIGHT) return 0;
    if (info->output_components != 3 || info->output_scanline != 0) return 0;
    if (lib.read_scanlines(info, rows, 1) != 1 || info->output_scanline != 1) return 0;
    for (size_t at = 0; at < sizeof row; at++)
        if (row[at] != SAMPLE_GREY) return 0;
    return 1;
}

/* Whether libjpeg takes our structures for its own, of the same size and with the same members; if not, says why. */
static int fits(char *message) {
    struct jpeg_decompress_struct info;
    Errors errors;
    volatile int same = 0; /* changes between setjmp and longjmp */
    memset(&info, 0, sizeof info);
    set_errors(&info, &errors);
    strcpy(message, "its structures have other members");
    if (setjmp(errors.stop) == 0) {
        lib.create(&info, JPEG_LIB_VERSION, sizeof info);
        lib.mem_src(&info, sample, sizeof sample);
        errors.manager.num_warnings = 1; /* reading a header resets it */
        lib.read_header(&info, 1);
        same = errors.manager.num_warnings == 0 && has_header_of_sample(&info) && has_row_of_sample(&info);
    } else {
        same = 0;
        errors.manager.format_message((j_common_ptr)&info, message);
    }
    lib.destroy(&info);
    return same;
}

static PyObject *bind(PyObject *module, PyObject *args) {
    (void)module;
    const char *path;
    if (!PyArg_ParseTuple(args, "s:bind", &path)) return NULL;
    void *pillow = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (pillow == NULL) {
        PyErr_Format(PyExc_ImportError, "%s is not loaded", path);
        return NULL;
    }
    const struct {
        const char *name;
        void **place;
    } functions[] = {
        {"jpeg_std_error", (void **)&lib.std_error},
        {"jpeg_destroy_decompress", (void **)&lib.destroy},
        {"jpeg_mem_src", (void **)&lib.mem_src},
        {"jpeg_read_header", (void **)&lib.read_header},
        {"jpeg_start_decompress", (void **)&lib.start},
        {"jpeg_read_scanlines", (void **)&lib.read_scanlines},
        {"jpeg_skip_scanlines", (void **)&lib.skip_scanlines},
        {"jpeg_crop_scanline", (void **)&lib.crop_scanline},
        {"jpeg_CreateDecompress", (void **)&lib.create}, /* last: the sign that all are there */
    };
    for (size_t number = 0; number < sizeof functions / sizeof *functions; number++) {
        /* Looks in the library itself, then in those that it depends on. */
        *functions[number].place = dlsym(pillow, functions[number].name);
        if (*functions[number].place == NULL) {
            PyErr_Format(PyExc_ImportError, "Pillow's libjpeg has no %s", functions[number].name);
            lib.create = NULL;
            return NULL;
        }
    }
    char message[JMSG_LENGTH_MAX] = "";
    if (!fits(message)) {
        PyErr_Format(PyExc_ImportError, "Pillow's libjpeg is another than this was built for: %s", message);
        lib.create = NULL;
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"bind", bind, METH_VARARGS, "bind(path): finds libjpeg by way of the extension module of Pillow at `path`."},
    {"decode_region", decode_region, METH_VARARGS,
     "decode_region(data, left, top, width, height): the rectangle's RGB bytes, or None when the file is declined."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_region", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__region(void) { return PyModule_Create(&module); }
