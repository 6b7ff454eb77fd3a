import Foundation
import TTTFormats
import TTTKit
import TTTReference

/// A model directory on the reference network: slow, in float32, on every system.
actor ReferenceTTTModel: TTTModel {
    nonisolated let info: TTTModelInfo
    private let network: ReferenceNetwork
    private let start: [LayerState]
    private var layers: [LayerState]

    /// - Parameter vocabulary: of the tokenizer, which the fingerprint covers.
    init(directory: URL, vocabulary: [(token: String, id: Int)]) throws {
        network = try ReferenceNetwork(directory: directory)
        let configuration = network.configuration
        info = try TTTModelInfo(
            miniBatchSize: configuration.miniBatchSize, vocabularySize: configuration.vocabularySize,
            prefillTokens: configuration.miniBatchSize, endTokens: Set(configuration.endTokens),
            fingerprint: Fingerprint.of(directory: directory, vocabulary: vocabulary))
        start = network.start
        layers = network.start
    }

    func prefill(_ block: [Int], length: Int) throws -> [Float] {
        var hidden: [Float] = []
        for token in block.prefix(length) { hidden = try network.read(token, &layers) }
        return network.logits(hidden)
    }

    func decode(_ token: Int, position: Int) throws -> [Float] {
        network.logits(try network.read(token, &layers))
    }

    func state(position: Int) -> [LayerState] {
        layers
    }

    func restore(_ state: [LayerState]) throws {
        guard state.count == start.count, zip(state, start).allSatisfy({ $0.hasShape(of: $1) }) else {
            throw TTTError.stateOfAnotherModel
        }
        layers = state
    }

    func reset() {
        layers = start
    }
}
