import Foundation
import TTTFormats

/// The hash by which Python's state files know a model: of the configuration, some values of every weight, and the
/// tokenizer's vocabulary. `fingerprint` in `mlx_ttt/text/state.py` is where this comes from.
package enum Fingerprint {
    private static let samples = 256

    /// - Parameter vocabulary: every token and its id.
    package static func of(directory: URL, vocabulary: [(token: String, id: Int)]) throws -> String {
        let file = directory.appendingPathComponent("config.json")
        let configuration = try ModelConfiguration(contentsOf: file)
        let given = try JSON(Data(contentsOf: file))
        var hash = SHA256()
        hash.update(text(of: configuration, given).utf8)
        let weights = try Weights(directory: directory)
        for name in weights.names where !(configuration.tiesEmbeddings && name == "lm_head.weight") {
            let values = try weights.values(name)
            let step = max(1, values.count / samples)
            hash.update(name.utf8)
            hash.update(littleEndian(stride(from: 0, to: values.count, by: step).map { values[$0] }))
        }
        let sorted = vocabulary.sorted { ($0.token.utf8.lexicographicallyPrecedes($1.token.utf8)) }
        hash.update("[\(sorted.map { "[\(quoted($0.token)), \($0.id)]" }.joined(separator: ", "))]".utf8)
        return hash.hexDigest()
    }

    /// The configuration as Python's `json.dumps` writes it, with the defaults of what is missing.
    private static func text(of configuration: ModelConfiguration, _ given: JSON) -> String {
        func number(_ name: String, _ value: Double) -> String {
            if given[name]?.isInteger == true, let whole = Int(exactly: value) { return "\(whole)" }
            return "\(value)"
        }
        let entries = [
            "conv_kernel": "\(configuration.convKernel)", "hidden_act": quoted("silu"),
            "hidden_size": "\(configuration.hiddenSize)", "intermediate_size": "\(configuration.intermediateSize)",
            "mini_batch_size": "\(configuration.miniBatchSize)", "model_type": quoted(given["model_type"]?.string ?? "ttt"),
            "num_attention_heads": "\(configuration.heads)", "num_hidden_layers": "\(configuration.layers)",
            "pre_conv": "\(configuration.hasConvolution)",
            "rms_norm_eps": number("rms_norm_eps", configuration.normEpsilon),
            "rope_theta": number("rope_theta", configuration.ropeTheta),
            "share_qk": "\(configuration.sharesQueriesAndKeys)", "tie_word_embeddings": "\(configuration.tiesEmbeddings)",
            "ttt_base_lr": number("ttt_base_lr", configuration.baseLearningRate),
            "ttt_layer_type": quoted(configuration.innerModel.rawValue), "use_gate": "\(configuration.hasGate)",
            "vocab_size": "\(configuration.vocabularySize)",
        ]
        return "{\(entries.sorted { $0.key < $1.key }.map { "\"\($0.key)\": \($0.value)" }.joined(separator: ", "))}"
    }
}
