import Foundation
import TTTFormats

/// What a tokenizer does to a text before it cuts it. Texts are UTF-8.
indirect enum Normalizer: Sendable {
    case sequence([Normalizer])
    case prepend([UInt8])
    case replace(Pattern, [UInt8])
    case strip(left: Bool, right: Bool)
    case unicode(UnicodeForm)
    case precompiled(CharacterMap)

    enum UnicodeForm: String, Sendable {
        case NFC, NFD, NFKC, NFKD
    }

    init(_ json: JSON?) throws {
        guard let json, !json.isNull else {
            self = .sequence([])
            return
        }
        let type = json["type"]?.string ?? ""
        switch type {
        case "Sequence": self = .sequence(try (json["normalizers"]?.array ?? []).map { try Normalizer($0) })
        case "Prepend": self = .prepend(Array((json["prepend"]?.string ?? "").utf8))
        case "Replace": self = .replace(try Pattern(json["pattern"]), Array((json["content"]?.string ?? "").utf8))
        case "Strip":
            self = .strip(left: json["strip_left"]?.bool ?? true, right: json["strip_right"]?.bool ?? true)
        case "Precompiled": self = .precompiled(try CharacterMap(base64: json["precompiled_charsmap"]?.string ?? ""))
        default:
            guard let form = UnicodeForm(rawValue: type) else {
                throw TTTError.unsupported("tokenizer.json has a normalizer \(type), which is not known here")
            }
            self = .unicode(form)
        }
    }

    func callAsFunction(_ text: [UInt8]) -> [UInt8] {
        switch self {
        case .sequence(let steps): return steps.reduce(text) { $1($0) }
        case .prepend(let prefix): return text.isEmpty ? text : prefix + text
        case .replace(let pattern, let content): return pattern.replacing(in: text, with: content)
        case .precompiled(let map): return map(text)
        case .strip(let left, let right):
            var scalars = Substring(String(decoding: text, as: UTF8.self)).unicodeScalars
            while left, let first = scalars.first, first.properties.isWhitespace { scalars.removeFirst() }
            while right, let last = scalars.last, last.properties.isWhitespace { scalars.removeLast() }
            return Array(String(scalars).utf8)
        case .unicode(let form):
            let text = String(decoding: text, as: UTF8.self)
            let normal: String
            switch form {
            case .NFC: normal = text.precomposedStringWithCanonicalMapping
            case .NFD: normal = text.decomposedStringWithCanonicalMapping
            case .NFKC: normal = text.precomposedStringWithCompatibilityMapping
            case .NFKD: normal = text.decomposedStringWithCompatibilityMapping
            }
            return Array(normal.utf8)
        }
    }
}
