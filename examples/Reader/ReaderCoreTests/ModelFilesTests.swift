import TTTFormats
import TTTKit
import XCTest

@testable import ReaderCore

#if os(Linux)
import CoreML
import TTTTestSupport

/// The files of an app, with a real package's description and the real network behind it.
final class ModelFilesTests: ReaderTestCase {
    private func appWithModel() throws -> URL {
        let app = folder.appendingPathComponent("Reader.app")
        try FileManager.default.createDirectory(at: app, withIntermediateDirectories: true)
        let package = app.appendingPathComponent("Shakespeare.mlmodelc")
        try FileManager.default.copyItem(at: Files.fixture("linear.mlpackage"), to: package)
        StandIn.shared.register(Files.bundled, for: package)
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            try FileManager.default.copyItem(
                at: Files.bundled.appendingPathComponent(name), to: app.appendingPathComponent(name))
        }
        // As `convert.py coreml` would write it.
        let weights = try Safetensors(contentsOf: Files.bundled.appendingPathComponent("model.safetensors"))
        let configuration = MLModelConfiguration()
        configuration.functionName = "decode"
        let metadata = try MLModel(contentsOf: package, configuration: configuration).modelDescription.metadata
        let model = (metadata[.creatorDefinedKey] as? [String: String])?["com.mlx-ttt.model"]
        var source = SafetensorsWriter(metadata: ["fingerprint": "a", "model": try XCTUnwrap(model)])
        for layer in 0..<4 {
            for name in ["W1", "b1"] {
                let tensor = try weights.tensor("model.layers.\(layer).seq_modeling_block.\(name)")
                source.add(
                    "\(layer).\(name)", type: "F32", shape: [1] + tensor.shape, bytes: littleEndian(tensor.values))
            }
        }
        try source.encoded().write(to: app.appendingPathComponent("source.safetensors"))
        return app
    }

    /// From a text file to two continuations side by side, as a person does it.
    @MainActor func testTheWholeApp() async throws {
        let files = try ModelFiles(in: appWithModel())
        let generator = try await files.generator()
        let shelf = StateShelf(folder: states)
        let session = ReadingSession(
            generator: generator, shelf: shelf, options: TTTOptions(maxTokens: 8, endTokens: []))
        session.open(Book(file: try write("ROMEO:\nBut, soft! what light through yonder", to: "Romeo.txt")))
        await session.finish()
        session.remember(as: "Light")
        await session.finish()
        session.goOn()
        await session.finish()
        XCTAssertNil(session.problem)
        let alone = session.written
        XCTAssertFalse(alone.isEmpty)
        session.remember(as: "Later")
        await session.finish()
        XCTAssertEqual(shelf.states.map(\.title), ["Later", "Light"])

        await session.memoryWarning()
        let comparison = Comparison(shelf.states.reversed(), generator: generator, shelf: shelf, tokensPerTurn: 3)
        comparison.start("", options: TTTOptions(maxTokens: 8, endTokens: []))
        await comparison.finish()
        XCTAssertNil(comparison.problem)
        XCTAssertEqual(comparison.sides[0].text, alone)
        XCTAssertNotEqual(comparison.sides[1].text, alone)
    }

    func testAnAppWithoutAModelSaysSo() {
        XCTAssertThrowsError(try ModelFiles(in: folder)) { XCTAssertEqual($0 as? ReaderError, .noModel) }
    }

    func testOptionsAreTheModels() throws {
        let app = try appWithModel()
        XCTAssertEqual(try ModelFiles(in: app).options(), TTTOptions(temperature: 0.8))
        let config = #"{"do_sample": true, "temperature": 0.5, "max_new_tokens": 9}"#
        try Data(config.utf8).write(to: app.appendingPathComponent("generation_config.json"))
        XCTAssertEqual(try ModelFiles(in: app).options(), TTTOptions(maxTokens: 9, temperature: 0.5))
    }
}
#endif
