/* The part of libjpeg's binary interface, version 62, that _region.c uses: it builds without libjpeg's own header.
 *
 * Members have libjpeg's names, types and order, so the compiler lays them out as it did for the library. What only the
 * library looks at is an untyped pointer here. `bind` compares all of it with the library that is there.
 */
#ifndef CODE_WORKER_JPEG_LIBJPEG_ABI_H
#define CODE_WORKER_JPEG_LIBJPEG_ABI_H

#include <stddef.h>

/* 62 stands for release 6b. Builds that imitate release 7 or 8 have larger structures and say 70 or 80. */
#define JPEG_LIB_VERSION 62
/* Bytes that a formatted message needs at most, its end included. */
#define JMSG_LENGTH_MAX 200

typedef int boolean;
typedef unsigned int JDIMENSION;
typedef unsigned char *JSAMPROW;
typedef JSAMPROW *JSAMPARRAY;

/* Later members stand for orders of channels that are never asked for. */
typedef enum { JCS_UNKNOWN, JCS_GRAYSCALE, JCS_RGB, JCS_YCbCr } J_COLOR_SPACE;

/* The beginning that compression and decompression share; callbacks get a pointer to it. */
#define JPEG_COMMON_MEMBERS \
    struct jpeg_error_mgr *err; \
    void *mem, *progress, *client_data; \
    boolean is_decompressor; \
    int global_state

typedef struct jpeg_common_struct {
    JPEG_COMMON_MEMBERS;
} *j_common_ptr;

/* Belongs to the caller; only libjpeg's functions fill it in, and they are never told its size. */
struct jpeg_error_mgr {
    void (*error_exit)(j_common_ptr);
    void (*emit_message)(j_common_ptr, int level);
    void (*output_message)(j_common_ptr);
    void (*format_message)(j_common_ptr, char *buffer);
    void (*reset_error_mgr)(j_common_ptr);
    int msg_code;
    union {
        int i[8];
        char s[80];
    } msg_parm;
    int trace_level;
    long num_warnings;
    const char *const *jpeg_message_table;
    int last_jpeg_message;
    const char *const *addon_message_table;
    int first_addon_message, last_addon_message;
};

/* One per colour channel of the file, in an array. */
typedef struct {
    int component_id, component_index, h_samp_factor, v_samp_factor;
    int quant_tbl_no, dc_tbl_no, ac_tbl_no;
    JDIMENSION width_in_blocks, height_in_blocks;
    int DCT_scaled_size;
    JDIMENSION downsampled_width, downsampled_height;
    boolean component_needed;
    int MCU_width, MCU_height, MCU_blocks, MCU_sample_width, last_col_width, last_row_height;
    void *quant_table, *dct_table;
} jpeg_component_info;

typedef struct jpeg_decompress_struct {
    JPEG_COMMON_MEMBERS;
    void *src;

    /* Known after the header. */
    JDIMENSION image_width, image_height;
    int num_components;
    J_COLOR_SPACE jpeg_color_space;

    /* Set to defaults by reading the header; the caller may change them before the start. */
    J_COLOR_SPACE out_color_space;
    unsigned int scale_num, scale_denom;
    double output_gamma;
    boolean buffered_image, raw_data_out;
    int dct_method; /* an enumeration */
    boolean do_fancy_upsampling, do_block_smoothing;
    boolean quantize_colors;
    int dither_mode; /* an enumeration */
    boolean two_pass_quantize;
    int desired_number_of_colors;
    boolean enable_1pass_quant, enable_external_quant, enable_2pass_quant;

    /* Known after the start; cropping changes the width. */
    JDIMENSION output_width, output_height;
    int out_color_components, output_components;
    int rec_outbuf_height, actual_number_of_colors;
    JSAMPARRAY colormap;

    /* How far it has come. */
    JDIMENSION output_scanline;
    int input_scan_number;
    JDIMENSION input_iMCU_row;
    int output_scan_number;
    JDIMENSION output_iMCU_row;
    int (*coef_bits)[64];

    /* What the segments before the scan said. */
    void *quant_tbl_ptrs[4], *dc_huff_tbl_ptrs[4], *ac_huff_tbl_ptrs[4];
    int data_precision;
    jpeg_component_info *comp_info;
    boolean progressive_mode, arith_code;
    unsigned char arith_dc_L[16], arith_dc_U[16], arith_ac_K[16];
    unsigned int restart_interval;
    boolean saw_JFIF_marker;
    unsigned char JFIF_major_version, JFIF_minor_version, density_unit;
    unsigned short X_density, Y_density;
    boolean saw_Adobe_marker;
    unsigned char Adobe_transform;
    boolean CCIR601_sampling;
    void *marker_list;

    /* The library's own, but for the components of the scan, by which `bind` checks `comp_info`. */
    int max_h_samp_factor, max_v_samp_factor, min_DCT_scaled_size;
    JDIMENSION total_iMCU_rows;
    void *sample_range_limit;
    int comps_in_scan;
    jpeg_component_info *cur_comp_info[4];
    JDIMENSION MCUs_per_row, MCU_rows_in_scan;
    int blocks_in_MCU, MCU_membership[10];
    int Ss, Se, Ah, Al;
    int unread_marker;
    void *master, *main, *coef, *post, *inputctl, *marker;
    void *entropy, *idct, *upsample, *cconvert, *cquantize;
} *j_decompress_ptr;

/* An enumeration is an int on every platform that Pillow has wheels for, unless the compiler is told to shorten it. */
_Static_assert(sizeof(J_COLOR_SPACE) == sizeof(int), "libjpeg's enumerations are as large as int");
/* Where long and pointers have 64 bits, sizes are the same on every processor. */
#define IS_LP64 (sizeof(long) == 8 && sizeof(void *) == 8)
_Static_assert(!IS_LP64 || sizeof(struct jpeg_error_mgr) == 168, "jpeg_error_mgr of version 62");
_Static_assert(!IS_LP64 || sizeof(jpeg_component_info) == 96, "jpeg_component_info of version 62");
_Static_assert(!IS_LP64 || sizeof(struct jpeg_decompress_struct) == 632, "jpeg_decompress_struct of version 62");

#endif
