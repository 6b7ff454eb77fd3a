// Trials of saved states and of memory, from outside the process that does it:
//
//     TTTTrials save FILE                 saves two states in turns until it is killed
//     TTTTrials large                     how long it takes to save and load states of the 1.3B shape
//     TTTTrials session DIRECTORY TOKENS  writes a long text, and says how much memory the process has

import Foundation
import TTTCommand
import TTTFormats
import TTTKit

/// A model of the 1.3B shape, of which only the state is there.
actor StateOnly: TTTModel {
    nonisolated let info: TTTModelInfo
    private var layers: [LayerState]

    init(layers: Int, isMLP: Bool) throws {
        info = try TTTModelInfo(
            miniBatchSize: 16, vocabularySize: 32000, prefillTokens: 16, endTokens: [], fingerprint: "trial")
        let (H, D, K) = (32, 64, 16)
        let shapes =
            isMLP
            ? [[1, H, D, 4 * D], [1, H, 1, 4 * D], [1, H, 4 * D, D], [1, H, 1, D]] : [[1, H, D, D], [1, H, 1, D]]
        func numbers(_ shape: [Int]) -> Tensor {
            let count = shape.reduce(1, *)
            return Tensor(shape: shape, values: (0..<count).map { Float($0 % 1021) / 1021 })
        }
        let layer = LayerState(
            offset: 7, weights: shapes.map(numbers), rows: numbers([1, H, K, isMLP ? 10 * D : 2 * D]),
            history: ["conv": numbers([1, 3, H * D]), "conv_qk": numbers([1, 3, H * D])])
        self.layers = [LayerState](repeating: layer, count: layers)
    }

    func prefill(_ block: [Int], length: Int) -> [Float] { [Float](repeating: 0, count: info.vocabularySize) }
    func decode(_ token: Int, position: Int) -> [Float] { [Float](repeating: 0, count: info.vocabularySize) }
    func state(position: Int) -> [LayerState] { layers }
    func restore(_ state: [LayerState]) { layers = state }
    func reset() {}
}

struct Letters: TTTTokenizer {
    func encode(_ text: String, addingSpecialTokens: Bool) -> [Int] { text.utf8.map { Int($0) } }
    func bytes(of token: Int) -> [UInt8] { [UInt8(truncatingIfNeeded: token)] }
    var leadingSpaces: LeadingSpaces { .kept }
}

func save(_ file: URL) async throws {
    let model = try StateOnly(layers: 2, isMLP: false)
    let generators = [
        TTTGenerator(model: model, tokenizer: Letters()), TTTGenerator(model: model, tokenizer: Letters()),
    ]
    try await generators[0].read("first state")
    try await generators[1].read("the second")
    while true {
        for generator in generators { try await generator.save(to: file) }
    }
}

func large() async throws {
    let file = FileManager.default.temporaryDirectory.appendingPathComponent("large-\(UUID().uuidString).state")
    defer { try? FileManager.default.removeItem(at: file) }
    for isMLP in [false, true] {
        let generator = TTTGenerator(model: try StateOnly(layers: 24, isMLP: isMLP), tokenizer: Letters())
        try await generator.read("some text")
        for _ in 0..<5 {
            let layers = try packedLayers(isMLP: isMLP)
            let conversion = await seconds {
                _ = layers.layout.unpack(layers.bits.map(Half.float), start: layers.start, offset: 7)
            }
            let saving = try await seconds { try await generator.save(to: file) }
            let loading = try await seconds { try await generator.load(from: file) }
            let size = (try file.resourceValues(forKeys: [.fileSizeKey]).fileSize ?? 0) / 1_000_000
            print(
                "\(isMLP ? "TTT-MLP" : "TTT-Linear"), \(size) MB: taken from the package in \(conversion),",
                "saved in \(saving), loaded in \(loading)")
        }
    }
}

/// How long it takes, and how long the processor works.
func seconds(_ body: () async throws -> Void) async rethrows -> String {
    let (start, processor) = (Date(), clock())
    try await body()
    let worked = Double(clock() - processor) / 1_000_000  // POSIX's CLOCKS_PER_SEC
    return String(format: "%.2f s (%.2f s of work)", Date().timeIntervalSince(start), worked)
}

/// A packed state in float16, as Core ML keeps it, and what it takes to make layers of it.
func packedLayers(isMLP: Bool) throws -> (layout: StateLayout, bits: [UInt16], start: [LayerState]) {
    let (layers, H, D, K) = (24, 32, 64, 16)
    let rows =
        isMLP
        ? [("W1", 4 * D), ("b1", 4), ("W2", 4 * D), ("b2", 1), ("k", K), ("e1", 4 * K), ("x2", 4 * K), ("e2", K)]
        : [("W1", D), ("b1", 1), ("k", K), ("e1", K)]
    var (parts, R) = ([String](), 0)
    for (name, count) in rows + [("conv", 3), ("conv_qk", 3)] {
        parts.append("\"\(name)\": [\(R), \(count)]")
        R += count
    }
    let text =
        "{\"shape\": [\(layers), \(H), \(R), \(D)], \"head_dim\": \(D), \"parts\": {\(parts.joined(separator: ", "))}}"
    let layout = try StateLayout(JSON(text.utf8))
    let shapes =
        isMLP
        ? [[1, H, D, 4 * D], [1, H, 1, 4 * D], [1, H, 4 * D, D], [1, H, 1, D]] : [[1, H, D, D], [1, H, 1, D]]
    let start = try layout.start(weights: [[Tensor]](repeating: shapes.map { Tensor(zeros: $0) }, count: layers))
    return (layout, (0..<layout.count).map { UInt16(truncatingIfNeeded: $0 & 0x3FFF) }, start)
}

/// In kB; -1 where the system does not say.
func memory() -> Int {
    guard let status = try? String(contentsOfFile: "/proc/self/status", encoding: .utf8),
        let line = status.split(separator: "\n").first(where: { $0.hasPrefix("VmRSS:") })
    else { return -1 }
    return line.split(separator: " ").compactMap { Int($0) }.first ?? -1
}

func session(_ directory: URL, tokens: Int) async throws {
    let tokenizer = try JSONTokenizer(folder: directory)
    let model = try ReferenceTTTModel(directory: directory, vocabulary: tokenizer.vocabulary)
    let generator = TTTGenerator(model: model, tokenizer: tokenizer)
    try await generator.read("the inhabitants")
    var written = 0
    while written < tokens {
        let part = min(tokens / 10, tokens - written)
        let options = TTTOptions(maxTokens: part, temperature: 1, seed: UInt64(written), endTokens: [])
        var bytes = 0
        for try await piece in generator.generate(options: options) { bytes += piece.utf8.count }
        written += part
        print("\(written) tokens, \(bytes) bytes of text, \(memory()) kB of memory")
    }
}

let arguments = CommandLine.arguments.dropFirst()
switch (arguments.first, arguments.count) {
case ("save", 2): try await save(URL(fileURLWithPath: arguments[2]))
case ("large", 1): try await large()
case ("session", 3): try await session(URL(fileURLWithPath: arguments[2]), tokens: Int(arguments[3]) ?? 50_000)
default: print("TTTTrials save FILE | large | session DIRECTORY TOKENS")
}
