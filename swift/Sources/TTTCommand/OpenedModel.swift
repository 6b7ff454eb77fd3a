import Foundation
import TTTCoreAI
import TTTFormats
import TTTKit

/// What runs behind `--model DIR`: a package and its companions in Core ML, a bundle in Core AI, or a model directory on
/// the reference network.
struct OpenedModel {
    let model: any TTTModel
    let tokenizer: JSONTokenizer
    /// What a person should know of it.
    let remark: String

    #if os(Linux)
    private static let hasFrameworks = false
    #else
    private static let hasFrameworks = true
    #endif

    init(_ directory: URL) async throws {
        let inBundle = directory.appendingPathComponent("tokenizer")
        let isBundle = FileManager.default.fileExists(atPath: inBundle.appendingPathComponent("tokenizer.json").path)
        tokenizer = try JSONTokenizer(folder: isBundle ? inBundle : directory)
        if Self.hasFrameworks, isBundle {
            model = try await Self.bundle(directory)
            remark = "Core AI runs \(directory.lastPathComponent)\n"
        } else if Self.hasFrameworks, let package = Self.package(in: directory) {
            let source = try ModelSource(contentsOf: directory.appendingPathComponent("source.safetensors"))
            model = try await CoreMLTTTModel.load(contentsOf: package, source: source)
            remark = "Core ML runs \(package.lastPathComponent)\n"
        } else {
            model = try ReferenceTTTModel(directory: directory, vocabulary: tokenizer.vocabulary)
            remark = "the reference network runs \(directory.lastPathComponent): this is slow\n"
        }
    }

    private static func bundle(_ directory: URL) async throws -> any TTTModel {
        #if canImport(CoreAI) && !(arch(x86_64) && !os(Linux))
        if #available(macOS 27, iOS 27, tvOS 27, visionOS 27, watchOS 27, *) {
            return try await CoreAITTTModel(bundle: directory)
        }
        #endif
        throw TTTError.unsupported("\(directory.lastPathComponent) is a bundle for Core AI, which macOS 27 has")
    }

    /// The compiled package in a folder.
    private static func package(in directory: URL) -> URL? {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: directory.path)) ?? []
        return names.first { $0.hasSuffix(".mlmodelc") }.map { directory.appendingPathComponent($0) }
    }
}
