import Foundation
import TTTFormats
import TTTKit
import TTTReference

/// A model directory on the reference network: slow, in float32, on every system.
package actor ReferenceTTTModel: TTTModel {
    package nonisolated let info: TTTModelInfo
    private let network: ReferenceNetwork
    private let start: [LayerState]
    private var layers: [LayerState]

    /// - Parameter vocabulary: of the tokenizer, which the fingerprint covers.
    package init(directory: URL, vocabulary: [(token: String, id: Int)]) throws {
        network = try ReferenceNetwork(directory: directory)
        let configuration = network.configuration
        info = try TTTModelInfo(
            miniBatchSize: configuration.miniBatchSize, vocabularySize: configuration.vocabularySize,
            prefillTokens: configuration.miniBatchSize, endTokens: Set(configuration.endTokens),
            fingerprint: Fingerprint.of(directory: directory, vocabulary: vocabulary))
        start = network.start
        layers = network.start
    }

    package func prefill(_ block: [Int], length: Int) throws -> [Float] {
        var hidden: [Float] = []
        for token in block.prefix(length) { hidden = try network.read(token, &layers) }
        return network.logits(hidden)
    }

    package func decode(_ token: Int, position: Int) throws -> [Float] {
        network.logits(try network.read(token, &layers))
    }

    package func state(position: Int) -> [LayerState] {
        layers
    }

    package func restore(_ state: [LayerState]) throws {
        guard state.count == start.count, zip(state, start).allSatisfy({ $0.hasShape(of: $1) }) else {
            throw TTTError.stateOfAnotherModel
        }
        layers = state
    }

    package func reset() {
        layers = start
    }
}
