// A picture of a PPM or PGM file (8 bits), cropped to the middle and resized as pillow's ImageOps.fit does it with its
// bicubic filter, which edgekit's own images went through. Rows come first here; where pillow begins with columns, as
// some versions do for tall pictures, a value may differ by 1 of 255.
#pragma once
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int height = 0, width = 0, channels = 0;
    std::vector<uint8_t> pixels;  // row by row, the channels of a pixel together

    uint8_t& at(int row, int column, int channel) {
        return pixels[(size_t(row) * width + column) * channels + channel];
    }
    uint8_t at(int row, int column, int channel) const {
        return pixels[(size_t(row) * width + column) * channels + channel];
    }
};

inline Picture blank(int height, int width, int channels) {
    return {height, width, channels, std::vector<uint8_t>(size_t(height) * width * channels)};
}

// A whole number of the header of a PPM; comments run from # to the end of a line.
inline int header_number(std::istream& file) {
    while (std::isspace(file.peek()) || file.peek() == '#') {
        if (file.get() != '#') continue;
        while (file.good() && file.get() != '\n') {}
    }
    int number = -1;
    file >> number;
    return file.fail() ? -1 : number;
}

// A binary PPM (P6) or PGM (P5) with the values 0 to 255.
inline Picture read_picture(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    char magic[2] = {};
    file.read(magic, 2);
    const bool color = magic[0] == 'P' && magic[1] == '6', grey = magic[0] == 'P' && magic[1] == '5';
    if (!color && !grey) throw std::runtime_error(path + ": no PPM or PGM file (P6, P5) can be read there");
    const int width = header_number(file), height = header_number(file), largest = header_number(file);
    if (width < 1 || height < 1 || width > 65535 || height > 65535 || largest != 255)
        throw std::runtime_error(path + ": only pictures with values from 0 to 255 are read");
    file.get();  // the one white space before the pixels
    Picture picture = blank(height, width, color ? 3 : 1);
    file.read(reinterpret_cast<char*>(picture.pixels.data()), std::streamsize(picture.pixels.size()));
    if (size_t(file.gcount()) != picture.pixels.size()) throw std::runtime_error(path + ": the picture is cut short");
    return picture;
}

// Grey by the weights of ITU-R 601 as pillow rounds them, or grey thrice.
inline Picture with_channels(const Picture& picture, int channels) {
    if (picture.channels == channels) return picture;
    if (channels != 1 && channels != 3) throw std::runtime_error("the file takes neither color nor grey pictures");
    Picture made = blank(picture.height, picture.width, channels);
    for (size_t place = 0; place < size_t(picture.height) * picture.width; place++) {
        if (channels == 3) {
            std::fill_n(&made.pixels[3 * place], 3, picture.pixels[place]);
        } else {
            const uint8_t* rgb = &picture.pixels[3 * place];
            made.pixels[place] = uint8_t((rgb[0] * 19595u + rgb[1] * 38470u + rgb[2] * 7471u + 0x8000u) >> 16);
        }
    }
    return made;
}

// One direction of pillow's resize (Resample.c): `out` pixels of [low, high) of each row, in fixed point.
inline Picture resize_rows(const Picture& picture, float low, float high, int out) {
    const int in = picture.width, bits = 32 - 8 - 2;
    const double scale = (high - low) / out, wide = std::max(scale, 1.0), support = 2 * wide;
    const auto bicubic = [](double x) {
        x = std::fabs(x);
        const double a = -0.5;
        return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    };
    Picture made = blank(picture.height, out, picture.channels);
    for (int column = 0; column < out; column++) {
        const double center = low + (column + 0.5) * scale;
        const int first = std::max(0, int(center - support + 0.5)), last = std::min(in, int(center + support + 0.5));
        std::vector<double> weights;
        double sum = 0;
        for (int x = first; x < last; x++) {
            weights.push_back(bicubic((x - center + 0.5) * (1 / wide)));
            sum += weights.back();
        }
        std::vector<int> fixed;
        for (double weight : weights) {
            const double value = (sum != 0 ? weight / sum : weight) * (1 << bits);
            fixed.push_back(int(value < 0 ? value - 0.5 : value + 0.5));
        }
        for (int row = 0; row < picture.height; row++)
            for (int channel = 0; channel < picture.channels; channel++) {
                int total = 1 << (bits - 1);
                for (int x = first; x < last; x++) total += picture.at(row, x, channel) * fixed[x - first];
                made.at(row, column, channel) = uint8_t(std::clamp(total >> bits, 0, 255));
            }
    }
    return made;
}

inline Picture turned(const Picture& picture) {
    Picture made = blank(picture.width, picture.height, picture.channels);
    for (int row = 0; row < picture.height; row++)
        for (int column = 0; column < picture.width; column++)
            for (int channel = 0; channel < picture.channels; channel++)
                made.at(column, row, channel) = picture.at(row, column, channel);
    return made;
}

// The largest middle part of the shape wanted, resized to it.
inline Picture fit(const Picture& picture, int height, int width) {
    const double live = double(picture.width) / picture.height, wanted = double(width) / height;
    double crop_width = picture.width, crop_height = picture.height;
    if (live > wanted) crop_width = wanted * picture.height;
    if (live < wanted) crop_height = picture.width / wanted;
    const double left = (picture.width - crop_width) * 0.5, top = (picture.height - crop_height) * 0.5;
    // The box is kept in 32 bits there.
    const Picture wide = resize_rows(picture, float(left), float(left + crop_width), width);
    return turned(resize_rows(turned(wide), float(top), float(top + crop_height), height));
}
