import Foundation
import TTTKit

/// The model among the app's files: a compiled package, and what `convert.py coreml` writes beside it.
struct ModelFiles: Sendable {
    let package: URL
    let folder: URL

    /// - Throws: `ReaderError.noModel`.
    init(in folder: URL) throws {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        guard let name = names.sorted().first(where: { $0.hasSuffix(".mlmodelc") }) else { throw ReaderError.noModel }
        package = folder.appendingPathComponent(name)
        self.folder = folder
    }

    func generator() async throws -> TTTGenerator {
        let source = try ModelSource(contentsOf: folder.appendingPathComponent("source.safetensors"))
        return TTTGenerator(
            model: try await CoreMLTTTModel.load(contentsOf: package, source: source),
            tokenizer: try JSONTokenizer(folder: folder))
    }

    /// How the model's makers would have it write.
    func options() -> TTTOptions {
        let file = folder.appendingPathComponent("generation_config.json")
        return (try? TTTOptions(generationConfig: file)) ?? TTTOptions(temperature: 0.8)
    }
}
