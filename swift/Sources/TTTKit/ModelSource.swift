import Foundation
import TTTFormats

/// What a package was exported from, in `source.safetensors` beside it: with it, states are kept as Python keeps them.
public struct ModelSource: Sendable, Equatable {
    /// Of the configuration, weights and tokenizer of the model directory.
    public let fingerprint: String
    /// The same without the tokenizer, which the package has too.
    let modelFingerprint: String
    /// Of the inner models before the first token, (W1, b1[, W2, b2]) of each layer, [1, H, ·, ·].
    package let startWeights: [[Tensor]]

    package init(fingerprint: String, modelFingerprint: String, startWeights: [[Tensor]]) {
        self.fingerprint = fingerprint
        self.modelFingerprint = modelFingerprint
        self.startWeights = startWeights
    }

    /// - Throws: `TTTError.unreadableFile`; `.formatVersion` if a newer version of mlx-ttt wrote it.
    public init(contentsOf file: URL) throws {
        let arrays = try Safetensors(contentsOf: file)
        let format = Int(arrays.metadata["format"] ?? "1") ?? 0  // the first ones say none
        guard format == 1 else { throw TTTError.formatVersion(format) }
        guard let fingerprint = arrays.metadata["fingerprint"], let model = arrays.metadata["model"] else {
            throw TTTError.unreadableFile(file.lastPathComponent, "it names no model")
        }
        (self.fingerprint, modelFingerprint) = (fingerprint, model)
        var layers: [[Tensor]] = []
        while arrays.shape(of: "\(layers.count).W1") != nil {
            let names = ["W1", "b1", "W2", "b2"].map { "\(layers.count).\($0)" }
            layers.append(try names.filter { arrays.shape(of: $0) != nil }.map { try arrays.tensor($0) })
        }
        startWeights = layers
    }
}
