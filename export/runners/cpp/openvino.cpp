// Runs an OpenVINO artifact on a device; needs OpenVINO's C++ library, and no edgekit.
//
//   classify ARTIFACT photo.ppm …         classes with their probabilities
//   djpeg photo.jpg | classify ARTIFACT /dev/stdin    PPM and PGM are read; libjpeg's djpeg makes them, and others
//   classify ARTIFACT --serve [HOST:]PORT a judge: edgekit verify … --judge tcp://127.0.0.1:PORT
//   classify ARTIFACT                     a judge on stdin and stdout: --judge "classify ARTIFACT"
//
// ARTIFACT is the folder with model.xml, model.bin and artifact.json; --threads N limits one inference. --serve listens
// on loopback unless another host is named: whoever reaches it may ask, and nothing is encrypted. Digests are not checked.
#include <openvino/openvino.hpp>

#include <cmath>
#include <cstdio>
#include <numeric>
#include <sstream>

#include "json.hpp"
#include "judge.hpp"
#include "picture.hpp"

namespace {

struct Artifact {
    std::string model;
    std::vector<std::string> classes;
    bool logits = true, channels_last = false;
    int channels = 0, height = 0, width = 0;
    float low = 0, high = 1;
    std::vector<float> mean, std;  // empty where normalization is inside

    explicit Artifact(const std::string& folder) : model(folder + "/model.xml") {
        const std::string path = folder + "/artifact.json";
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + ": there is no such file");
        std::stringstream source;
        source << file.rdbuf();
        try {
            const Json record = Json::parse(source.str());
            const Json &input = record.at("input"), &shape = input.at("shape"), &norm = input.at("normalization");
            if (!record.at("format").is("openvino")) throw std::runtime_error("this runner opens openvino alone");
            if (input.at("crop").kind != Json::Null) throw std::runtime_error("it asks for a crop unknown here");
            for (const Json& name : record.at("classes").items) classes.push_back(name.as_text());
            logits = record.at("outputs").is("logits");
            channels_last = input.at("layout").is("NHWC");
            channels = int(shape.at(channels_last ? 3 : 1).as_number());
            height = int(shape.at(channels_last ? 1 : 2).as_number());
            width = int(shape.at(channels_last ? 2 : 3).as_number());
            low = float(input.at("range").at(size_t(0)).as_number());
            high = float(input.at("range").at(size_t(1)).as_number());
            for (int channel = 0; channel < channels && !norm.is("inside"); channel++) {
                mean.push_back(float(norm.at("mean").at(size_t(channel)).as_number()));
                std.push_back(float(norm.at("std").at(size_t(channel)).as_number()));
            }
        } catch (const std::exception& error) {
            throw std::runtime_error(path + ": " + error.what());
        }
    }
};

class Runner {
public:
    Runner(const Artifact& artifact, int threads) : artifact_(artifact) {
        // Float products in float32, as edgekit opens it: processors with AMX would take bfloat16 by themselves.
        ov::AnyMap options = {ov::hint::inference_precision(ov::element::f32), ov::num_streams(1)};
        if (threads) options.insert(ov::inference_num_threads(threads));
        compiled_ = core_.compile_model(core_.read_model(artifact.model), "CPU", options);
        request_ = compiled_.create_infer_request();
        const ov::Dimension batch = compiled_.input(0).get_partial_shape()[0];
        batch_ = batch.is_dynamic() ? 0 : size_t(batch.get_length());
    }

    Scores operator()(const uint32_t (&shape)[4], const std::vector<float>& pixels) {
        const Artifact& a = artifact_;
        if (int(shape[1]) != a.channels || int(shape[2]) != a.height || int(shape[3]) != a.width)
            throw std::runtime_error("it takes images of " + std::to_string(a.channels) + "x" +
                                     std::to_string(a.height) + "x" + std::to_string(a.width));
        const size_t area = size_t(a.height) * a.width, each = area * a.channels;
        const size_t step = batch_ ? batch_ : shape[0];
        Scores made{shape[0], 0, {}};
        for (size_t first = 0; first < shape[0]; first += step) {
            ov::Shape wanted = {step, size_t(a.channels), size_t(a.height), size_t(a.width)};
            if (a.channels_last) wanted = {step, size_t(a.height), size_t(a.width), size_t(a.channels)};
            ov::Tensor input(ov::element::f32, wanted);
            float* into = input.data<float>();
            for (size_t image = 0; image < step; image++) {
                // A file that takes one number of images gets its last batch filled up with the last image.
                const float* from = &pixels[std::min(first + image, size_t(shape[0]) - 1) * each];
                for (size_t place = 0; place < each; place++) {
                    const size_t channel = place / area, spot = place % area;
                    float value = from[place];
                    if (a.low != 0 || a.high != 1) value = value * (a.high - a.low) + a.low;
                    if (!a.mean.empty()) value = (value - a.mean[channel]) / a.std[channel];
                    into[image * each + (a.channels_last ? spot * a.channels + channel : place)] = value;
                }
            }
            request_.set_input_tensor(input);
            request_.infer();
            const ov::Tensor output = request_.get_output_tensor(0);
            made.classes = uint32_t(output.get_size() / step);
            const float* values = output.data<const float>();
            made.values.insert(made.values.end(), values,
                               values + std::min(step, shape[0] - first) * size_t(made.classes));
        }
        return made;
    }

private:
    Artifact artifact_;
    ov::Core core_;
    ov::CompiledModel compiled_;
    ov::InferRequest request_;
    size_t batch_ = 0;
};

// The most probable classes of a picture, one line each.
void classify(Runner& runner, const Artifact& artifact, const std::string& path) {
    const Picture picture =
        fit(with_channels(read_picture(path), artifact.channels), artifact.height, artifact.width);
    const uint32_t shape[4] = {1, uint32_t(artifact.channels), uint32_t(artifact.height), uint32_t(artifact.width)};
    std::vector<float> pixels;
    for (int channel = 0; channel < artifact.channels; channel++)
        for (int row = 0; row < artifact.height; row++)
            for (int column = 0; column < artifact.width; column++)
                pixels.push_back(picture.at(row, column, channel) / 255.0f);
    const Scores scores = runner(shape, pixels);
    std::vector<double> shares(scores.values.begin(), scores.values.end());
    if (artifact.logits) {
        const double highest = *std::max_element(shares.begin(), shares.end());
        for (double& share : shares) share = std::exp(share - highest);
        const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
        for (double& share : shares) share /= sum;
    }
    std::vector<size_t> order(std::min(shares.size(), artifact.classes.size()));
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return shares[a] > shares[b]; });
    for (size_t rank = 0; rank < std::min<size_t>(5, order.size()); rank++) {
        std::string name = artifact.classes[order[rank]];
        for (char& letter : name)
            if (static_cast<unsigned char>(letter) < 32 || letter == 127) letter = '?';  // it could move the cursor
        std::printf("%s\t%.6f\t%s\n", path.c_str(), shares[order[rank]], name.c_str());
    }
}

}  // namespace

int main(int count, char** words) {
    std::signal(SIGPIPE, SIG_IGN);
    std::string folder, address;
    std::vector<std::string> pictures;
    int threads = 0;
    for (int place = 1; place < count; place++) {
        const std::string word = words[place];
        if (word == "--serve" && place + 1 < count) address = words[++place];
        else if (word == "--threads" && place + 1 < count) threads = std::atoi(words[++place]);
        else if (word.rfind("--", 0) == 0) folder.clear(), place = count;
        else if (folder.empty()) folder = word;
        else pictures.push_back(word);
    }
    if (folder.empty() || (pictures.empty() && address.empty() && isatty(0))) {
        std::cerr << "classify ARTIFACT (photo.ppm … | --serve [HOST:]PORT) [--threads N]; with neither, from a program, "
                     "it is a judge on stdin and stdout\n";
        return 2;
    }
    try {
        const Artifact artifact(folder);
        Runner runner(artifact, threads);
        for (const std::string& path : pictures) classify(runner, artifact, path);
        const Model model = [&](const uint32_t(&shape)[4], const std::vector<float>& pixels) {
            return runner(shape, pixels);
        };
        if (!address.empty()) serve(model, address);
        else if (pictures.empty()) serve_on_stdout(model);
    } catch (const std::exception& error) {
        // One line: OpenVINO begins with the place in its own sources, and says what is wrong last.
        std::string said = error.what();
        while (!said.empty() && std::isspace(static_cast<unsigned char>(said.back()))) said.pop_back();
        std::cerr << folder << ": " << said.substr(said.find_last_of('\n') + 1) << "\n";
        return 2;
    }
    return 0;
}
